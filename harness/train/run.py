"""Train one arm with TRL: rows and plan in, adapter (or full model) and the log of every step out.

Command: `python -m harness.train +method=dpo seed=1` runs one trial: train, generate, score.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.config.arms import ARMS, DPOMarginConfig, SimPOConfig
from harness.config.machine import has_gpu
from harness.config.schema import Engine, Reference, RunConfig, Tuning
from harness.data.plan import BatchPlan, ConsumedTokens, share_of
from harness.data.tokens import ChatFormat, TokenPair
from harness.train.adapter import (
    adapter_config,
    count_parameters,
    on_quantised,
    save_weights,
    trained_weights,
    undo_quantised_extras,
)
from harness.train.base import load_base, uses_bf16
from harness.train.checkpoints import last_checkpoint
from harness.train.memory import needs_checkpointing


@dataclass(frozen=True)
class TrainResult:
    """What training leaves besides the weights.

    Attributes:
        steps: one row a step, under TRL's metric names. Rewards, log-probs and losses are not comparable across arms.
        consumed_tokens_sha256: hash of the pairs that the trainer saw, in order.
        num_pairs: how many it saw.
        parameters: number of weights, `total` and `trainable`.
        packed: True where the model ran on packed batches (see `harness.train.packed`).
        why_padded: why it could not, where that was asked for.
        peak_memory_bytes: of all processes where there were several; else 0, and the trial's own clock knows it.
    """

    steps: list[dict[str, Any]]
    consumed_tokens_sha256: str
    num_pairs: int
    parameters: dict[str, int]
    packed: bool
    why_padded: str
    peak_memory_bytes: int = 0

    @property
    def facts(self) -> dict[str, Any]:
        """What the manifest records."""
        facts = {"consumed_tokens_sha256": self.consumed_tokens_sha256, "parameters": self.parameters}
        return facts | {"packed": self.packed, "why_padded": self.why_padded}


def train_arm(
    config: RunConfig,
    rows: tuple[TokenPair, ...],
    plan: BatchPlan,
    *,
    model: Any,
    chat: ChatFormat,
    folder: Path,
    reference: Any = None,
    on_step: Callable[[int, dict[str, Any]], None] = lambda step, logs: None,
) -> TrainResult:
    """Train one arm and save `adapter/` or `model/` in `folder`; resume from the newest complete checkpoint there.

    Args:
        config: the trial.
        rows: the training pairs.
        plan: the order of the rows, the same for every arm.
        model: the base, in which the adapter stays, or whose weights are trained.
        chat: the tokenizer, for padding.
        folder: the trial's folder.
        reference: the base's log-probs, shape (num_rows, 2); None: TRL computes them, or the arm needs none.
        on_step: called after each logged step.

    Raises:
        DivergedError: at the first loss or gradient norm that is not finite.
    """
    from tqdm import tqdm

    from harness.train.trainers import TrialCallback

    output = folder / "checkpoints"
    resume, consumed = last_checkpoint(output) or (None, ConsumedTokens())
    trainer = build_trainer(config, rows, plan, model=model, chat=chat, output_dir=output, reference=reference)
    trainer.consumed, parameters = consumed, count_parameters(trainer.model)  # before they are sharded
    with tqdm(total=plan.num_steps, desc=f"train {config.method.name} seed {config.seed}", delay=5, leave=False) as bar:

        def advance(step: int, logs: dict[str, Any]) -> None:
            bar.update(step - bar.n)
            on_step(step, logs)

        trainer.add_callback(TrialCallback(consumed, advance))
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    save_weights(trainer, folder, config)
    return _result(trainer, consumed, parameters)


def _result(trainer: Any, consumed: ConsumedTokens, parameters: dict[str, int]) -> TrainResult:
    return TrainResult(
        steps=[entry for entry in trainer.state.log_history if "loss" in entry],
        consumed_tokens_sha256=consumed.state,
        num_pairs=consumed.num_pairs,
        parameters=parameters,
        packed=getattr(trainer, "packs", False),  # TRL's own engine knows nothing of packing
        why_padded=getattr(trainer, "why_padded", ""),
    )


def build_trainer(
    config: RunConfig,
    rows: tuple[TokenPair, ...],
    plan: BatchPlan,
    *,
    model: Any,
    chat: ChatFormat,
    output_dir: Path,
    reference: Any = None,
) -> Any:
    """Build the arm's trainer over the rows in the plan's order, with an adapter where one is trained."""
    from datasets import disable_progress_bars
    from transformers.trainer_callback import PrinterCallback

    from harness.train.trainers import TRAINERS

    disable_progress_bars()
    arm = ARMS[config.method.name]
    assert arm.trainer is not None, f"{config.method.name} is not trained"
    trainer_class, config_class = TRAINERS[config.train.engine.value, arm.trainer]
    arguments = common_arguments(config, plan, output_dir) | dict(arm.trl_arguments(config.method))
    arguments |= _data_arguments(arm.trainer, rows, has_reference=reference is not None)
    if arguments["gradient_checkpointing"] is None:
        arguments["gradient_checkpointing"] = _checkpoints(config, model, rows, plan)
    is_quantised = config.train.tuning is Tuning.qlora
    adapted = on_quantised(model, config) if is_quantised else model
    start = trained_weights(adapted) if is_quantised else {}
    processes, dataset = config.accelerate.num_processes, _dataset(rows, with_margin(reference, rows, config))
    trainer = trainer_class(
        model=adapted,
        args=config_class(**arguments),
        train_dataset=dataset.select(plan.order) if processes == 1 else dataset,  # a share has the plan's row numbers
        processing_class=chat.tokenizer,
        peft_config=adapter_config(config) if config.train.tuning is Tuning.lora else None,
        **(
            {"ref_model": load_base(config)}
            if arm.uses_reference and config.train.reference is Reference.separate
            else {}
        ),
    )
    trainer.remove_callback(PrinterCallback)  # train.jsonl has each step; the terminal has a bar
    if is_quantised:
        undo_quantised_extras(trainer.model, start=start, has_reference=reference is not None)
    if processes > 1:
        trainer.take_share(share_of(plan, trainer.args.process_index, processes))
    if config.train.engine is Engine.paired:
        _make_fast(trainer, model, config, rows, chat)
    return trainer


def _data_arguments(trainer: str, rows: Sequence[TokenPair], *, has_reference: bool) -> dict[str, Any]:
    """Return what TRL's trainers must know of rows that are tokenised already."""
    if trainer == "CPOTrainer":  # nothing is cut, since every row fits; its collator needs columns that no model does
        return {"max_length": max(row.length for row in rows), "remove_unused_columns": False}
    return {"max_length": None, "precompute_ref_log_probs": has_reference}


def _checkpoints(config: RunConfig, model: Any, rows: Sequence[TokenPair], plan: BatchPlan) -> bool:
    """Decide on gradient checkpointing: by an estimate, until memory has run out and shown it wrong."""
    shares = config.train.engine is Engine.paired and config.train.levers.share_prefix
    has_run_out = plan.micro_batch_size != config.train.micro_batch_size
    return has_run_out or needs_checkpointing(model, rows, plan, share_prefix=shares)


def _make_fast(trainer: Any, model: Any, config: RunConfig, rows: tuple[TokenPair, ...], chat: ChatFormat) -> None:
    """Let the model answer from packed batches where it can; where it cannot, say so and leave TRL's own pass."""
    from harness.train.adapter import fuse_adapters
    from harness.train.logps import why_padded
    from harness.train.packed import ATTENTION, answer_packed_calls

    if isinstance(config.method, SimPOConfig):
        trainer.length_norm = config.method.length_norm
    levers = config.train.levers
    if levers.fuse_adapters and config.train.tuning is Tuning.lora:
        fuse_adapters(model)
    if not (levers.share_prefix or levers.completion_head):
        return
    trainer.why_padded = why_padded(model, rows, chat.tokenizer.pad_token_id)
    if trainer.why_padded:
        return
    trainer.packs, trainer.metrics_steps = True, levers.metrics_steps
    for each in [model, *([trainer.ref_model] if getattr(trainer, "ref_model", None) is not None else [])]:
        each.set_attn_implementation(ATTENTION)  # to stay: gradient checkpointing runs layers again going backward
        answer_packed_calls(
            each,
            share_prefix=levers.share_prefix,
            completion_head=levers.completion_head,
            metrics=trainer.wants_metrics,
        )


def with_margin(reference: Any, rows: Sequence[TokenPair], config: RunConfig) -> Any:
    """Put a target margin into the base's log-probs of the chosen answers, since TRL's DPO has none.

    With `ratio` nats more on the chosen side the loss is `-log sigmoid(beta * (difference - ratio))`: SimPO's margin
    (arXiv 2405.14734, Eq. 6) on DPO's reward; on a reward per token, `ratio` counts for each token of the answer.

    Args:
        reference: the base's log-probs, shape (num_rows, 2), or None.
        rows: the pairs.
        config: the trial; only arms with a margin of their own are changed.
    """
    method = config.method
    if reference is None or not isinstance(method, DPOMarginConfig):
        return reference
    lengths = [len(row.chosen_ids) if ARMS[method.name].per_token else 1 for row in rows]
    shifted = reference.clone()
    shifted[:, 0] += method.gamma_beta_ratio * shifted.new_tensor(lengths)
    return shifted


def common_arguments(config: RunConfig, plan: BatchPlan, output_dir: Path) -> dict[str, Any]:
    """Return the training arguments that are equal for all arms, each one explicit: trainers differ in defaults."""
    train = config.train
    return {
        "output_dir": str(output_dir),
        "num_train_epochs": 1,  # the plan holds all epochs
        "train_sampling_strategy": "sequential",  # the rows stand in the plan's order
        "per_device_train_batch_size": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.batch_size // (plan.micro_batch_size * config.accelerate.num_processes),
        "learning_rate": config.method.learning_rate,
        "lr_scheduler_type": train.scheduler,
        "warmup_steps": math.ceil(train.warmup_ratio * plan.num_steps),
        "weight_decay": train.weight_decay,
        "max_grad_norm": train.max_grad_norm,
        "optim": "adamw_torch",
        "bf16": uses_bf16(config),
        "fp16": False,
        "use_cpu": not has_gpu(),
        "gradient_checkpointing": train.gradient_checkpointing,
        "disable_dropout": True,
        "seed": config.seed,
        "data_seed": config.seed,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # the filter would show a diverged run as a good one
        "save_strategy": "steps",
        "save_steps": train.checkpoint_steps,
        "save_total_limit": None,  # older checkpoints are deleted once the newest is sealed
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": has_gpu(),
        "ddp_find_unused_parameters": False,  # every trained weight takes part in every step
    }


def _dataset(rows: Sequence[TokenPair], reference: Any) -> Any:
    """Lay rows out as the trainers read them, with the base's log-probs where there are any."""
    from datasets import Dataset

    sides = ("prompt_ids", "chosen_ids", "rejected_ids")
    columns: list[dict[str, Any]] = [{side: list(getattr(row, side)) for side in sides} for row in rows]
    if reference is not None:
        for column, (chosen, rejected) in zip(columns, reference.tolist(), strict=True):
            column |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    return Dataset.from_list(columns)
