"""The micro-batch that a study's trials train with: as configured, or smaller where a GPU ran out of memory.

It belongs to the study and not to a trial: where one trial has to halve it, all trials of both arms train with the
smaller one, those that were trained with a larger one again, so that all have the same batch plan. A step's pairs stay
what they are. Imports no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harness.records import locked, read_json, write_json
from harness.schema import RunConfig

FILE = "micro_batch.json"


class DoesNotFitError(RuntimeError):
    """A model that cannot be trained in this memory, however small the micro-batch."""


def micro_batch_size(config: RunConfig) -> int:
    """Return the micro-batch of a trial's study, in pairs for each process."""
    asked = config.train.micro_batch_size
    assert asked is not None, "the profile fills it"
    return min(asked, settled(Path(config.results_dir) / str(config.study)) or asked)


def settled(study: Path) -> int | None:
    """Return the micro-batch that a study had to settle for; None where it trains with what was configured."""
    try:
        found = read_json(study / FILE)["micro_batch_size"]
    except (OSError, ValueError, KeyError, TypeError):  # one that was cut off is found again by running out of memory
        return None
    return found if isinstance(found, int) and found > 0 else None


def halve(config: RunConfig, tried: int, *, about: dict[str, Any]) -> int:
    """Settle for a smaller micro-batch than the one with which a trial ran out of memory; return it.

    Args:
        config: the trial.
        tried: the micro-batch that did not fit.
        about: what the study records of the trial and the device.

    Raises:
        DoesNotFitError: where none is smaller.
    """
    batch = config.train.batch_size
    assert batch is not None, "the profile fills it"
    study, processes = Path(config.results_dir) / str(config.study), config.accelerate.num_processes
    with locked(study):
        known = settled(study)
        if known is not None and known < tried:  # another trial was first
            return known
        smaller = next((size for size in range(tried // 2, 0, -1) if batch % (size * processes) == 0), 0)
        if not smaller:
            raise DoesNotFitError(
                f"{config.model.path} does not fit: training it on pairs of up to data.max_length="
                f"{config.data.max_length} tokens ran out of memory with train.micro_batch_size={tried}, and no "
                f"smaller one divides the step; {_advice(config)}"
            )
        rows = _history(study)
        rows.append(about | {"from": tried, "to": smaller})
        write_json(study / FILE, {"micro_batch_size": smaller, "asked": config.train.micro_batch_size, "halved": rows})
    return smaller


def _history(study: Path) -> list[dict[str, Any]]:
    try:
        return list(read_json(study / FILE)["halved"])
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _advice(config: RunConfig) -> str:
    ways = [] if config.train.gradient_checkpointing else ["train.gradient_checkpointing=true"]
    ways += ["train.tuning=lora"] if config.train.tuning.value == "full" else ["train.tuning=qlora"]
    return f"try {', '.join(ways)}, a smaller data.max_length, or accelerate=fsdp over several GPUs"
