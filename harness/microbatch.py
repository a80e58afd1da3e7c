"""The micro-batch that a study's trials train with: as configured, or smaller where a GPU ran out of memory.

It belongs to the study and not to a trial: once one trial has had to halve it, all trials train with the smaller one,
and those of the same seed that were trained with a larger one train again, so that the arms of a seed have the same
batch plan. Seeds that were finished before stay as they are. A step's pairs never change. Imports no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harness.records import locked, read_json, write_json
from harness.schema import RunConfig

FILE = "micro_batch.json"


class NoRoomError(RuntimeError):
    """Training ran out of memory, where a smaller micro-batch may help."""


class DoesNotFitError(RuntimeError):
    """A model that cannot be trained in this memory, however small the micro-batch."""


def micro_batch_size(config: RunConfig) -> int:
    """Return the micro-batch of a trial's study, in pairs for each process."""
    asked = config.train.micro_batch_size
    assert asked is not None, "the profile fills it"
    return min(asked, settled(Path(config.results_dir) / str(config.study)) or asked)


def settled(study: Path) -> int | None:
    """Return the micro-batch that a study had to settle for; None where it trains with what was configured."""
    return _read(study).get("micro_batch_size")


def is_outdated(study: Path, seed: Any, trained_with: Any) -> bool:
    """Whether a trial was trained with a larger micro-batch than another one of its seed."""
    smallest = _read(study).get("seeds", {}).get(str(seed))
    return smallest is not None and isinstance(trained_with, int) and trained_with > smallest


def note_seed(config: RunConfig, size: int) -> None:
    """Note that a trial of this seed is about to train with a micro-batch that a study has settled for."""
    study = Path(config.results_dir) / str(config.study)
    if settled(study) is None:
        return
    with locked(study):
        found = _read(study)
        found["seeds"][str(config.seed)] = min(size, found["seeds"].get(str(config.seed), size))
        write_json(study / FILE, found)


def _read(study: Path) -> dict[str, Any]:
    """Read the study's file; one that was cut off is written anew when memory runs out again."""
    try:
        found = read_json(study / FILE)
    except (OSError, ValueError):
        return {}
    whole = isinstance(found, dict) and isinstance(found.get("micro_batch_size"), int)
    return found if whole and isinstance(found.get("seeds"), dict) else {}


def halve(config: RunConfig, tried: int, *, about: dict[str, Any]) -> int:
    """Settle for a smaller micro-batch than the one with which a trial ran out of memory; return it.

    Args:
        config: the trial.
        tried: the micro-batch that did not fit.
        about: what the study records of the trial and the device.

    Raises:
        DoesNotFitError: where none is smaller.
    """
    study = Path(config.results_dir) / str(config.study)
    with locked(study):
        known = settled(study)
        if known is not None and known < tried:  # another trial was first
            return known
        smaller = smaller_than(config, tried)
        found = _read(study)
        halved = [*found.get("halved", []), about | {"from": tried, "to": smaller}]
        about_study = {"micro_batch_size": smaller, "asked": config.train.micro_batch_size}
        write_json(study / FILE, about_study | {"seeds": found.get("seeds", {}), "halved": halved})
    return smaller


def smaller_than(config: RunConfig, tried: int) -> int:
    """Return the next smaller micro-batch that makes up the same step.

    Raises:
        DoesNotFitError: where none is smaller.
    """
    batch, processes = config.train.batch_size, config.accelerate.num_processes
    assert batch is not None, "the profile fills it"
    smaller = next((size for size in range(tried // 2, 0, -1) if batch % (size * processes) == 0), 0)
    if not smaller:
        raise DoesNotFitError(
            f"{config.model.path} does not fit: training it on pairs of up to data.max_length="
            f"{config.data.max_length} tokens ran out of memory with train.micro_batch_size={tried}, and no "
            f"smaller one divides the step; {_advice(config)}"
        )
    return smaller


def _advice(config: RunConfig) -> str:
    ways = [] if config.train.gradient_checkpointing else ["train.gradient_checkpointing=true"]
    ways += ["train.tuning=lora"] if config.train.tuning.value == "full" else ["train.tuning=qlora"]
    return f"try {', '.join(ways)}, or a smaller data.max_length"
