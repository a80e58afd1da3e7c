"""Folders of `conf/`, `sweeps/` and the embedded study, in a checkout and in a wheel."""

from __future__ import annotations

from pathlib import Path

from harness.study.errors import UsageError


def _shipped_folder(folder: str, marker: str) -> Path:
    """Find a folder at the top of a checkout, or inside the package in a wheel."""
    here = Path(__file__).resolve().parents[1]
    for place in (here.parent / folder, here / folder):
        if (place / marker).exists():
            return place
    raise UsageError(f"{folder}/{marker} is neither beside nor inside {here}; install the package again")


CONF = _shipped_folder("conf", "sweep.yaml")
SWEEPS = _shipped_folder("sweeps", "smoke.yaml")


def embedded_dir() -> Path:
    """Return the folder of the shipped base model, tokenizer, train.jsonl, dev.jsonl, golden.jsonl and card.json."""
    return Path(__file__).resolve().parents[1] / "embedded" / "study"
