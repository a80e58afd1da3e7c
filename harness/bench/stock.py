"""One run as a user of TRL writes it: a script in its own process, text in, adapter out, no import of the harness.

Command: `python stock.py ARM MODEL PAIRS.jsonl OUT_DIR KEY=VALUE...`; prints one line of JSON with seconds per stage.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer

start = time.perf_counter()

TRAINERS = {
    "dpo": (DPOTrainer, DPOConfig, {}),
    "simpo": (CPOTrainer, CPOConfig, {"loss_type": "simpo", "cpo_alpha": 0.0}),
}
COMMON = {
    "per_device_train_batch_size": 4,
    "num_train_epochs": 1,
    "max_length": 1024,
    "gradient_checkpointing": False,
    "bf16": False,
    "use_cpu": True,
    "train_sampling_strategy": "sequential",  # so that the losses can be compared
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
}


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
    trainer = trainer_class(
        model=AutoModelForCausalLM.from_pretrained(model_path, dtype="float32"),
        args=config_class(output_dir=out, **COMMON, **own, **keys),
        train_dataset=load_pairs(pairs),
        processing_class=AutoTokenizer.from_pretrained(model_path),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    ready = time.perf_counter()
    trainer.train()
    trained = time.perf_counter()
    trainer.save_model(out)
    marks = {"import": imported - start, "load": ready - imported, "train": trained - ready}
    result = {
        "seconds": marks | {"save": time.perf_counter() - trained},
        "peak_memory_bytes": _peak_memory_bytes(),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }
    print(json.dumps(result))


def _peak_memory_bytes() -> int:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    main()
