"""How a trial failed: what failure.json holds, and whether the sweep's command tries again by itself. Imports no torch.

Errors of the outside world (`harness.outside`) never stand: the same command runs the trial again. Since no list of
those is complete, an error of any other kind stands only once the same error has come back in a second run of the
command; then it is told until `retry_failed=true` asks for another attempt.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness.outside import is_outside, meaning
from harness.records import read_json, write_json
from harness.redaction import redact

FILE = "failure.json"
EARLIER = "earlier_failure.json"  # of the last run of the command that left one; kept to compare with
_FULL_BYTES = 16 * 2**20  # with less, an error of whatever kind is most likely a file that could not be written


def describe(error: BaseException, stage: str, about: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return what failure.json holds.

    `outside`: whether the outside world is the cause; `retries`: whether the same command runs the trial again.
    """
    failure = {"stage": stage, "error": type(error).__name__, "message": redact(error) + _advice(error, stage)}
    outside = is_outside(error) or _is_full(folder)
    return {
        **about,
        **failure,
        "outside": outside,
        "retries": outside or not _is_same(failure, _read(folder / EARLIER)),
        "traceback": redact("".join(traceback.format_exception(error))),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _advice(error: BaseException, stage: str) -> str:
    if type(error).__name__ == "OutOfMemoryError":
        smaller = {"generate": "a smaller generate.batch_size", "heldout": "a smaller data.max_length"}
        return f"; try {smaller.get(stage, 'a GPU with more memory, or train.tuning=qlora')}"
    means = meaning(error)
    return f"; {means}" if means else ""


def _is_full(folder: Path) -> bool:
    try:
        return shutil.disk_usage(folder).free < _FULL_BYTES
    except OSError:  # the folder is gone
        return True


def _is_same(failure: dict[str, Any], earlier: dict[str, Any]) -> bool:
    """Return whether two failures are alike but for numbers, addresses and paths."""
    return all(_words(failure[key]) == _words(earlier.get(key)) for key in ("stage", "error", "message"))


def _words(text: object) -> list[str]:
    return [word for word in str(text).split() if not re.search(r"[\d/]", word)]


def _read(path: Path) -> dict[str, Any]:
    """Read a failure; empty where there is none, or it was cut off: the trial runs again."""
    try:
        failure = read_json(path)
    except (OSError, ValueError):
        return {}
    return failure if isinstance(failure, dict) else {}


def write_failure(folder: Path, failure: dict[str, Any]) -> None:
    """Write failure.json; where that is impossible, too, the trial runs again without it."""
    with contextlib.suppress(OSError, MemoryError):
        write_json(folder / FILE, failure)


def set_aside(folder: Path) -> None:
    """Put the failure of an earlier run of the command aside: failure.json is of this run, or is not there."""
    with contextlib.suppress(FileNotFoundError):
        (folder / FILE).replace(folder / EARLIER)


def forget(folder: Path) -> None:
    """Delete what failed attempts left, since one succeeded."""
    for name in (FILE, EARLIER):
        (folder / name).unlink(missing_ok=True)


def own_failure(folder: Path) -> str:
    """Say how a trial failed where the outside world is not known to be the cause; empty elsewhere."""
    failure = _read(folder / FILE)
    return "" if failure.get("outside", failure.get("retries", True)) else _sentence(failure)


def standing_failure(folder: Path) -> str:
    """Say how a trial failed that is not run again by itself; empty where it is, or has not failed."""
    failure = _read(folder / FILE)
    return "" if failure.get("retries", True) else _sentence(failure)


def _sentence(failure: dict[str, Any]) -> str:
    return f"{failure.get('stage')}: {failure.get('error')}: {failure.get('message')}"
