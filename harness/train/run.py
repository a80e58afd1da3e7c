"""Train one arm with TRL: rows, plan and learning rate in; adapter (or full model) and the log of every step out."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from harness.config.arms import ARMS, DPOMarginConfig, SimPOConfig
from harness.config.machine import has_gpu
from harness.config.schema import Engine, Optimizer, Reference, RunConfig, Tuning
from harness.data.plan import BatchPlan, ConsumedTokens, share_of
from harness.data.token_rows import TokenPair, lengths_of, pair_lengths
from harness.data.tokens import ChatFormat
from harness.study.manifest import Manifest
from harness.train.adapter import (
    adapter_config,
    adapter_on_quantised,
    count_parameters,
    fuse_adapters,
    restore_adapter_dropout,
    save_weights,
    trained_weights,
    undo_quantised_extras,
)
from harness.train.base import load_base, uses_bf16, uses_tf32
from harness.train.checkpoints import Schedule, last_checkpoint
from harness.train.layout import Layout
from harness.train.memory import needs_checkpointing

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

    from harness.train.trainers import PairedCPOTrainer, PairedDPOTrainer, StockCPOTrainer, StockDPOTrainer

    PairTrainer = StockDPOTrainer | StockCPOTrainer
    PairedTrainer = PairedDPOTrainer | PairedCPOTrainer

OnStep = Callable[[int, dict[str, float]], None]
ArgumentValue = str | float | bool | list[str] | dict[str, bool] | None


@dataclass(frozen=True)
class TrainResult:
    """What training returns beside the weights.

    Attributes:
        steps: one row per step, under TRL's metric names. Rewards, log-probs and losses are not comparable across arms.
        consumed_tokens_sha256: hash of the pairs that the trainer consumed, in order.
        num_pairs: number of consumed pairs.
        parameters: number of weights, `total` and `trainable`.
        packed: True where the model ran on packed batches (see `harness.train.packed`).
        why_padded: why it did not, where that was requested.
        peak_memory_bytes: of all processes, where there were several; else 0, and the trial's meter has it.
    """

    steps: list[dict[str, float]]
    consumed_tokens_sha256: str
    num_pairs: int
    parameters: dict[str, int]
    packed: bool
    why_padded: str
    peak_memory_bytes: int = 0

    @property
    def facts(self) -> Manifest:
        """Return the entries of the manifest."""
        return {
            "consumed_tokens_sha256": self.consumed_tokens_sha256,
            "parameters": self.parameters,
            "packed": self.packed,
            "why_padded": self.why_padded,
        }


def train_arm(  # noqa: PLR0913 - what differs between trials, each by its name
    config: RunConfig,
    rows: Sequence[TokenPair],
    plan: BatchPlan,
    *,
    model: PreTrainedModel,
    chat: ChatFormat,
    folder: Path,
    reference: Tensor | None = None,
    layout: Layout | None = None,
    on_step: OnStep = lambda step, logs: None,
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
        layout: the study's; None tries the shortest pair packed.
        on_step: called after each logged step.

    Raises:
        DivergedError: at the first loss or gradient norm that is not finite.
        RuntimeError: where the trainer gets other token ids than those of the rows.
    """
    from tqdm import tqdm

    from harness.train.trainers import TrialCallback

    output = folder / "checkpoints"
    resume, consumed = last_checkpoint(output) or (None, ConsumedTokens())
    trainer = build_trainer(
        config, rows, plan, model=model, chat=chat, output_dir=output, reference=reference, layout=layout
    )
    trainer.consumed, parameters = consumed, count_parameters(trainer.model)  # before they are sharded
    with tqdm(total=plan.num_steps, desc=f"train {config.method.name} seed {config.seed}", delay=5, leave=False) as bar:

        def advance(step: int, logs: dict[str, float]) -> None:
            bar.update(step - bar.n)
            on_step(step, logs)

        schedule = Schedule(config.train.checkpoint_steps, config.train.checkpoint_minutes)
        trainer.add_callback(TrialCallback(consumed, advance, schedule))
        with tf32(on=uses_tf32(config)):
            trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    trainer.comparison.settle()
    save_weights(trainer, folder, config)
    return TrainResult(
        steps=[entry for entry in trainer.state.log_history if "loss" in entry],
        consumed_tokens_sha256=consumed.state,
        num_pairs=consumed.num_pairs,
        parameters=parameters,
        packed=trainer.layout.way == "packed",
        why_padded=trainer.layout.why,
    )


def build_trainer(
    config: RunConfig,
    rows: Sequence[TokenPair],
    plan: BatchPlan,
    *,
    model: PreTrainedModel,
    chat: ChatFormat,
    output_dir: Path,
    reference: Tensor | None = None,
    layout: Layout | None = None,
) -> PairTrainer:
    """Build the arm's trainer over the rows in the plan's order, with an adapter where one is trained."""
    from datasets import disable_progress_bars
    from transformers.trainer_callback import PrinterCallback

    from harness.train.collator import ROW, TensorComparison
    from harness.train.trainers import TRAINERS, RowNumbers

    disable_progress_bars()
    arm = ARMS[config.method.name]
    assert arm.trainer is not None, f"{config.method.name} is not trained"
    kind = TRAINERS[config.train.engine.value, arm.trainer]
    arguments = common_arguments(config, plan, output_dir) | dict(arm.trl_arguments(config.method))
    processes = config.accelerate.num_processes
    is_given = reference is not None and arm.trainer == "DPOTrainer"
    # A whole policy in parts cannot have `NoModel` beside it: then TRL is told at once, and hashes all weights.
    is_hashed = is_given and config.train.tuning is Tuning.full and processes > 1
    if arm.trainer == "CPOTrainer":
        arguments["max_length"] = int(pair_lengths(rows).max())  # nothing is truncated; null means 512 there
    else:
        # The router's loss: DPOTrainer adds it to the loss of every mixture of experts, CPOTrainer does not.
        arguments |= {
            "max_length": None,
            "precompute_ref_log_probs": is_hashed,
            "router_aux_loss_coef": 0.0,
        }
    if arguments["gradient_checkpointing"] is None:
        arguments["gradient_checkpointing"] = _uses_checkpointing(config, model, rows, plan, layout)
    is_quantised = config.train.tuning is Tuning.qlora
    adapted = adapter_on_quantised(model, config) if is_quantised else model
    start = trained_weights(adapted) if is_quantised else {}
    trainer = kind.trainer(
        model=adapted,
        args=kind.arguments(**arguments),
        # With several processes, a share holds the plan's row numbers.
        train_dataset=RowNumbers.from_dict({ROW: list(plan.order) if processes == 1 else list(range(len(rows)))}),
        processing_class=chat.tokenizer,
        peft_config=adapter_config(config, model) if config.train.tuning is Tuning.lora else None,
        **_reference_model(config, model, is_given=is_given and not is_hashed),
    )
    if is_given and not is_hashed:
        trainer.take_reference()
    trainer.data_collator = trainer.pair_collator(rows, with_margin(reference, rows, config))
    trainer.comparison = TensorComparison()
    trainer.remove_callback(PrinterCallback)  # train.jsonl has each step; the terminal has a bar
    if is_quantised:
        undo_quantised_extras(trainer.model, start=start, has_reference=reference is not None)
    if processes > 1:
        trainer.take_share(share_of(plan, trainer.args.process_index, processes))
    restore_adapter_dropout(trainer.model, config.train.lora_dropout)
    trainer.layout = layout or _tried_layout(model, config, rows, chat)
    if config.train.engine is Engine.paired:
        _pull_levers(trainer, model, config)
    return trainer


def _reference_model(config: RunConfig, model: PreTrainedModel, *, is_given: bool) -> dict[str, torch.nn.Module]:
    """Return the argument `ref_model` of TRL's trainer, where it has one.

    TRL would load a missing reference by itself, with the noise and the positions that `make_pure` has taken away.
    """
    from harness.train.trainers import NoModel

    is_full = config.train.tuning is Tuning.full
    is_trls = config.train.engine is Engine.stock and is_full
    if ARMS[config.method.name].uses_reference and (config.train.reference is Reference.separate or is_trls):
        return {"ref_model": load_base(config, Path(model.name_or_path))}
    return {"ref_model": NoModel(model.config)} if is_given and is_full else {}


def _uses_checkpointing(
    config: RunConfig, model: PreTrainedModel, rows: Sequence[TokenPair], plan: BatchPlan, layout: Layout | None
) -> bool:
    """Decide on gradient checkpointing by an estimate, or True where memory has run out in spite of it."""
    if plan.micro_batch_size != config.train.micro_batch_size:
        return True
    way = layout.way if layout else "packed" if uses_packing(config) else "padded"
    return needs_checkpointing(config, model, rows, plan, way=way, bf16=uses_bf16(config))


def _tried_layout(model: PreTrainedModel, config: RunConfig, rows: Sequence[TokenPair], chat: ChatFormat) -> Layout:
    import torch

    from harness.train.logps import packing_problem, why_padded

    if not uses_packing(config):
        return Layout("padded")
    why = why_padded(model, rows, chat.tokenizer.pad_token_id)
    why = why or packing_problem(model, rows, torch.bfloat16 if uses_bf16(config) else model.dtype)
    return Layout("padded" if why else "packed", why)


def uses_packing(config: RunConfig) -> bool:
    """Return whether packed batches were asked for."""
    levers = config.train.levers
    return config.train.engine is Engine.paired and (levers.share_prefix or levers.completion_head)


def _pull_levers(trainer: PairedTrainer, model: PreTrainedModel, config: RunConfig) -> None:
    """Set up the paired engine: fused adapters, and packed batches where the model can be run so."""
    from harness.train.attention import ATTENTION
    from harness.train.packed import alone_logps, packed_logps
    from harness.train.trainers import logps_of_all_rows

    levers, way = config.train.levers, trainer.layout.way
    if isinstance(config.method, SimPOConfig):
        trainer.length_norm = config.method.length_norm
    if levers.fuse_adapters and config.train.tuning is Tuning.lora:
        fuse_adapters(model)
    if way == "padded":
        return
    trainer.metrics_steps = levers.metrics_steps
    reference_model = getattr(trainer, "ref_model", None)
    models = [model] if reference_model is None else [model, reference_model]
    if way == "alone":
        trainer.run_packed(models, alone_logps, share_prefix=False)
        return
    for each in models:
        each.set_attn_implementation(ATTENTION)  # to stay: gradient checkpointing runs layers again going backward
    run = packed_logps if levers.completion_head else logps_of_all_rows
    trainer.run_packed(models, run, share_prefix=levers.share_prefix)


def with_margin(reference: Tensor | None, rows: Sequence[TokenPair], config: RunConfig) -> Tensor | None:
    """Add a target margin to the base's log-probs of the chosen answers, since TRL's DPO has no margin.

    With `ratio` nats more on the chosen side the loss is `-log sigmoid(beta * (difference - ratio))`: SimPO's margin
    (arXiv 2405.14734, Eq. 6) on DPO's reward; with a reward per token, `ratio` is added per token of the answer.

    Args:
        reference: the base's log-probs, shape (num_rows, 2), or None.
        rows: the pairs.
        config: the trial; only arms with a margin of their own are changed.
    """
    method = config.method
    if reference is None or not isinstance(method, DPOMarginConfig):
        return reference
    lengths = lengths_of(rows)[:, 1].tolist() if ARMS[method.name].per_token else [1] * len(rows)
    shifted = reference.clone()
    shifted[:, 0] += method.gamma_beta_ratio * shifted.new_tensor(lengths)
    return shifted


_OPTIMIZERS = {Optimizer.adamw: "adamw_torch", Optimizer.adamw_8bit: "adamw_bnb_8bit"}  # names of transformers


def _default_optimizer() -> str:
    """Return AdamW in one kernel for all weights on a GPU, and torch's plain one on a CPU."""
    return "adamw_torch_fused" if has_gpu() else "adamw_torch"


@contextlib.contextmanager
def tf32(*, on: bool) -> Iterator[None]:
    """Compute products of fp32 matrices in TF32 inside the block.

    Around training and its reference alone: the preconditions are proved in fp32. Not by transformers' argument `tf32`,
    which stays set for all that the process does later.
    """
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if on else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def common_arguments(config: RunConfig, plan: BatchPlan, output_dir: Path) -> dict[str, ArgumentValue]:
    """Return the training arguments that are equal for all arms, each one explicit: trainers differ in defaults."""
    train = config.train
    return {
        "output_dir": str(output_dir),
        "num_train_epochs": 1,  # the plan holds all epochs
        "train_sampling_strategy": "sequential",  # the rows stand in the plan's order
        "remove_unused_columns": False,  # the only column is the row's number
        "per_device_train_batch_size": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.batch_size // (plan.micro_batch_size * config.accelerate.num_processes),
        "learning_rate": config.method.learning_rate,
        "lr_scheduler_type": train.scheduler,
        "warmup_steps": math.ceil(train.warmup_ratio * plan.num_steps),
        "weight_decay": train.weight_decay,
        "max_grad_norm": train.max_grad_norm,
        "optim": _OPTIMIZERS[train.optimizer] if train.optimizer is not Optimizer.auto else _default_optimizer(),
        "bf16": uses_bf16(config),
        "fp16": False,
        "use_cpu": not has_gpu(),
        "gradient_checkpointing": train.gradient_checkpointing,
        "disable_dropout": True,
        "seed": config.seed,
        "data_seed": config.seed,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # the filter would show a diverged run as a good one
        "save_strategy": "no",  # `TrialCallback` says when: by minutes, and not once more at the end
        "save_total_limit": None,  # older checkpoints are deleted once the newest is sealed
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": has_gpu(),
        "accelerator_config": {"non_blocking": has_gpu()},  # copies from page-locked memory wait for nothing
        "ddp_find_unused_parameters": False,  # every trained weight takes part in every step
    }
