"""Folders of `conf/`, `sweeps/` and the embedded study, in a checkout and in a wheel; `~` in a config."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from harness.study.errors import UsageError

_AFTER_KEY = re.compile(r"(?<=[=,\[])~[\w.-]*(?=/)")


def _shipped_folder(folder: str, marker: str) -> Path:
    """Find a folder at the top of a checkout, or inside the package in a wheel."""
    here = Path(__file__).resolve().parents[1]
    for place in (here.parent / folder, here / folder):
        if (place / marker).exists():
            return place
    raise UsageError(f"{folder}/{marker} is neither beside nor inside {here}; install the package again")


def expand_home(config: Any) -> None:
    """Write the home folder in the place of `~` in all texts of a config: no shell does after KEY=."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            expand_home(value)
        elif isinstance(value, str):
            setattr(config, field.name, _expanded(value))
        elif isinstance(value, list):
            setattr(config, field.name, [_expanded(item) if isinstance(item, str) else item for item in value])


def typed_home(overrides: Iterable[str]) -> list[str]:
    """Write the home folder in the place of a typed `KEY=~/...`: in Hydra's grammar `~` takes a key away."""
    return [_AFTER_KEY.sub(lambda found: os.path.expanduser(found[0]), text) for text in overrides]  # noqa: PTH111


def _expanded(text: str) -> str:
    return os.path.expanduser(text)  # noqa: PTH111 - Path would change what is no path


CONF = _shipped_folder("conf", "sweep.yaml")
SWEEPS = _shipped_folder("sweeps", "smoke.yaml")


def embedded_dir() -> Path:
    """Return the folder of the shipped base model, tokenizer, train.jsonl, dev.jsonl, golden.jsonl and card.json."""
    return Path(__file__).resolve().parents[1] / "embedded" / "study"
