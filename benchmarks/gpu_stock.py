"""TRL's own trainers on the pairs of the GPU check, with TRL's own defaults: what the harness is compared with.

Made for `gpu.py`. The trainers get token ids, so that both sides train on the same ones; all else is TRL's: padding,
the order of the pairs in a step, bf16 autocast, gradient checkpointing, fused AdamW, PEFT's layers.
"""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import trl.trainer.dpo_trainer as trl_dpo
from datasets import Dataset, disable_progress_bars
from gpu_harness import GPU, INPUTS, Ran, StepClock, facts_of, free_memory, give_back, run_config, sync
from transformers import LlamaForCausalLM
from transformers.trainer_callback import PrinterCallback
from trl import DPOConfig, DPOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer

from harness.config.arms import ARMS
from harness.data.plan import make_plan
from harness.data.tokens import TokenPair
from harness.train.adapter import adapter_config

Column = list[int]


def has_liger() -> bool:
    """Whether Liger's kernels can be used here: they need a GPU."""
    return GPU and importlib.util.find_spec("liger_kernel") is not None


class GivenDPO(DPOTrainer):
    """TRL's DPO trainer on token ids; it notes the seconds of its own reference pass."""

    reference_seconds = 0.0

    def _prepare_dataset(self, dataset: Dataset, *_: object) -> Dataset:
        return dataset

    def _precompute_ref_logps(self, *args: object, **kwargs: object) -> Dataset:
        sync()
        began = time.perf_counter()
        found = super()._precompute_ref_logps(*args, **kwargs)
        sync()
        self.reference_seconds += time.perf_counter() - began
        return found


class GivenCPO(CPOTrainer):
    """TRL's CPO trainer (for SimPO) on token ids."""

    reference_seconds = 0.0

    def tokenize_row(self, feature: dict[str, Column], model: object = None) -> dict[str, Column]:
        """Leave a row of ids as it is."""
        return feature


def _dpo_row(row: TokenPair) -> dict[str, Column]:
    return {"prompt_ids": [*row.prompt_ids], "chosen_ids": [*row.chosen_ids], "rejected_ids": [*row.rejected_ids]}


def _cpo_row(row: TokenPair) -> dict[str, Column]:
    columns: dict[str, Column] = {}
    for side, answer in (("chosen", row.chosen_ids), ("rejected", row.rejected_ids)):
        columns[f"{side}_input_ids"] = [*row.prompt_ids, *answer]
        columns[f"{side}_attention_mask"] = [1] * (len(row.prompt_ids) + len(answer))
        columns[f"{side}_labels"] = [-100] * len(row.prompt_ids) + [*answer]
    return columns


def train_stock(
    arm: str,
    rows: Sequence[TokenPair],
    model: LlamaForCausalLM,
    *,
    batch: int,
    warmup: int,
    **keys: bool,
) -> Ran:
    """Train a lent model as TRL's script does, and give it back.

    Args:
        arm: `dpo` or `simpo`.
        rows: the pairs, all in one epoch; each step has the pairs of the harness's step.
        model: the base, in which an adapter is trained.
        batch: pairs of a step; a micro-batch has half of them.
        warmup: steps at the start that count neither for seconds nor for memory.
        keys: of TRL's config, beside its defaults.
    """
    attention, folder = model.config._attn_implementation, Path(tempfile.mkdtemp())
    free_memory()
    try:
        return _train(arm, rows, model, folder, batch=batch, warmup=warmup, **keys)
    finally:
        give_back(model)
        model.set_attn_implementation(attention)
        free_memory()
        shutil.rmtree(folder, ignore_errors=True)


def _train(
    arm: str,
    rows: Sequence[TokenPair],
    model: LlamaForCausalLM,
    folder: Path,
    *,
    batch: int,
    warmup: int,
    **keys: bool,
) -> Ran:
    disable_progress_bars()
    config = run_config(arm)
    plan = make_plan(len(rows), epochs=1, batch_size=batch, micro_batch_size=batch // 2, seed=0)
    ordered = tuple(rows[i] for i in plan.order)
    common = {
        "output_dir": str(folder),
        "num_train_epochs": 1,
        "per_device_train_batch_size": batch // 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": config.method.learning_rate,
        "max_length": max(row.length for row in rows),  # nothing is cut
        "train_sampling_strategy": "sequential",  # the rows stand in the harness's order
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": not GPU,
    }
    is_dpo = arm == "dpo"
    common |= dict(ARMS[arm].trl_arguments(config.method))  # beta, gamma, the kind of loss
    given = DPOConfig(**common, **keys) if is_dpo else CPOConfig(**common, **keys)
    columns = [_dpo_row(row) if is_dpo else _cpo_row(row) for row in ordered]
    clock = StepClock(warmup)
    began = time.perf_counter()
    # The hash of all weights takes tens of seconds of a large model; it is measured by itself.
    with patch.object(trl_dpo, "hash_module", lambda model: f"not hashed {time.time_ns()}"):
        trainer = (GivenDPO if is_dpo else GivenCPO)(
            model=model,
            args=given,
            train_dataset=Dataset.from_list(columns),
            processing_class=INPUTS.tokens(config).chat.tokenizer,
            peft_config=adapter_config(config, model),
            callbacks=[clock],
        )
    trainer.remove_callback(PrinterCallback)
    built = time.perf_counter() - began - trainer.reference_seconds
    trainer.train()
    used = ordered[warmup * batch :]
    facts = facts_of(trainer, clock, used) | {
        "build_s": built,
        "reference_ms_a_pair": trainer.reference_seconds / len(rows) * 1e3,
    }
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    return Ran([s["loss"] for s in steps], [s["grad_norm"] for s in steps], facts, used, clock.seconds)
