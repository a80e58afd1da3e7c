"""One run as a user of TRL writes it: a script in its own process, text in, adapter out, no import of the harness.

Command: `python stock.py ARM MODEL PAIRS.jsonl OUT_DIR KEY=VALUE...`; prints one line of JSON with seconds per stage.
On a GPU the weights are in bf16 and all else is TRL's default: bf16 autocast, gradient checkpointing, fused AdamW.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import DPOConfig, DPOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer

start = time.perf_counter()

COMMON: dict[str, str | int | list[str]] = {
    "per_device_train_batch_size": 4,
    "num_train_epochs": 1,
    "max_length": 1024,
    "train_sampling_strategy": "sequential",  # so that the losses can be compared
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
}
ON_A_CPU = {"gradient_checkpointing": False, "bf16": False, "use_cpu": True}


class StepClock(TrainerCallback):
    """Notes when training began and when each of its steps ended, the GPU's work included."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Begin anew."""
        self.ends = [_now()]

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Note the time."""
        self.ends.append(_now())


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class TimedDPOTrainer(DPOTrainer):
    """TRL's trainer, with the seconds of its own reference pass."""

    reference_seconds = 0.0

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        began = _now()
        found = super()._precompute_ref_logps(dataset, name, batch_size)
        self.reference_seconds += _now() - began
        return found


TRAINERS = {
    "dpo": (TimedDPOTrainer, DPOConfig, {}),
    "simpo": (CPOTrainer, CPOConfig, {"loss_type": "simpo", "cpo_alpha": 0.0}),
}


def settings(*, is_gpu: bool) -> dict[str, str | int | list[str]]:
    """Return what is set for both arms: on a GPU nothing but the batch and the order, all else is TRL's default."""
    return COMMON | ({} if is_gpu else ON_A_CPU)


def load_pairs(path: str) -> Dataset:
    """Read pairs as conversations."""
    rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return Dataset.from_list([{key: [{"role": roles[key], "content": row[key]}] for key in roles} for row in rows])


def main() -> None:
    """Train one arm."""
    imported = time.perf_counter()
    arm, model_path, pairs, out = sys.argv[1:5]
    keys = {key: json.loads(value) for key, value in (item.split("=") for item in sys.argv[5:])}
    trainer_class, config_class, own = TRAINERS[arm]
    is_gpu, clock = torch.cuda.is_available(), StepClock()
    trainer = trainer_class(
        model=AutoModelForCausalLM.from_pretrained(model_path, dtype="bfloat16" if is_gpu else "float32"),
        args=config_class(output_dir=out, **settings(is_gpu=is_gpu), **own, **keys),
        train_dataset=load_pairs(pairs),
        processing_class=AutoTokenizer.from_pretrained(model_path),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[clock],
    )
    ready = _now()
    reference = getattr(trainer, "reference_seconds", 0.0)
    trainer.train()
    trained = _now()
    trainer.save_model(out)
    marks = {"import": imported - start, "load": ready - imported - reference, "train": trained - ready}
    marks |= {"reference": reference} if reference else {}
    result = {
        "seconds": marks | {"save": time.perf_counter() - trained},
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if is_gpu else _peak_memory_bytes(),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "step_ends": clock.ends,
    }
    print(json.dumps(result))


def _peak_memory_bytes() -> int:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    main()
