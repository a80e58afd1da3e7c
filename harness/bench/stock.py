"""One run as a user of TRL writes it: a script in a process of its own, text in, adapter out, nothing of the harness.

Command: `python stock.py ARM MODEL PAIRS.jsonl OUT_DIR KEY=VALUE...`; prints one line of JSON with seconds by stage.
"""

import json
import sys
import time
from pathlib import Path

start = time.perf_counter()

from datasets import Dataset  # noqa: E402
from peft import LoraConfig  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402
from trl import DPOConfig, DPOTrainer  # noqa: E402
from trl.experimental.cpo import CPOConfig, CPOTrainer  # noqa: E402


def main() -> None:
    """Train one arm."""
    imported = time.perf_counter()
    arm, model_path, pairs, out = sys.argv[1:5]
    keys = {key: json.loads(value) for key, value in (item.split("=") for item in sys.argv[5:])}
    rows = [json.loads(line) for line in Path(pairs).read_text(encoding="utf-8").splitlines()]
    dataset = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": row["prompt"]}],
                "chosen": [{"role": "assistant", "content": row["chosen"]}],
                "rejected": [{"role": "assistant", "content": row["rejected"]}],
            }
            for row in rows
        ]
    )
    common = {
        "output_dir": out,
        "per_device_train_batch_size": 4,
        "num_train_epochs": 1,
        "max_length": 1024,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "train_sampling_strategy": "sequential",  # so that the losses can be laid side by side
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    parts = {
        "model": AutoModelForCausalLM.from_pretrained(model_path, dtype="float32"),
        "train_dataset": dataset,
        "processing_class": AutoTokenizer.from_pretrained(model_path),
        "peft_config": LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    }
    if arm == "dpo":
        trainer = DPOTrainer(args=DPOConfig(**common, **keys), **parts)
    else:
        simpo = {"loss_type": "simpo", "cpo_alpha": 0.0}
        trainer = CPOTrainer(args=CPOConfig(**common, **simpo, **keys), **parts)
    ready = time.perf_counter()
    trainer.train()
    trained = time.perf_counter()
    trainer.save_model(out)
    ended = time.perf_counter()
    print(
        json.dumps(
            {
                "seconds": {
                    "import": imported - start,
                    "load": ready - imported,
                    "train": trained - ready,
                    "save": ended - trained,
                },
                "peak_memory_bytes": _peak_memory_bytes(),
                "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
            }
        )
    )


def _peak_memory_bytes() -> int:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    main()
