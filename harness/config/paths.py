"""Where `conf/`, `sweeps/` and the embedded study are, in a checkout and in a wheel."""

from __future__ import annotations

from pathlib import Path

from harness.study.errors import UsageError


def _shipped(folder: str, marker: str) -> Path:
    """Find a folder that stands at the top of a checkout and inside the package in a wheel."""
    here = Path(__file__).resolve().parents[1]
    for place in (here.parent / folder, here / folder):
        if (place / marker).exists():
            return place
    raise UsageError(f"{folder}/{marker} is neither beside nor inside {here}; install the package again")


CONF = _shipped("conf", "sweep.yaml")
SWEEPS = _shipped("sweeps", "smoke.yaml")


def embedded_dir() -> Path:
    """Return the folder of the shipped base model, tokenizer, train.jsonl, dev.jsonl, golden.jsonl and card.json."""
    return Path(__file__).resolve().parents[1] / "embedded" / "study"
