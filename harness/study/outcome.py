"""How a trial failed: what failure.json holds, and whether the sweep's command tries again by itself. Imports no torch.

Errors of the outside world (`harness.study.errors`) never stand: the same command runs the trial again. No list of
those is complete, so an error of any other kind stands only once the same error has come back in a second run of the
command; then it is told until `retry_failed=true` asks for another attempt.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import traceback
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypedDict

from harness.study.errors import is_outside, meaning
from harness.study.files import Reader, read_json, write_json
from harness.study.rows import TrialName
from harness.study.text import redact

FAILURE_FILE = "failure.json"
EARLIER = "earlier_failure.json"  # of the last run of the command that left one; kept to compare with


class Failure(TypedDict, total=False):
    """failure.json: how a trial failed; an empty mapping stands for no failure.

    Attributes:
        trial_id, arm, config, seed: the trial.
        stage: `load`, `reference`, `train`, `generate`, `heldout` or `score`.
        error, message: class and text of the exception, with advice.
        outside: whether the outside world is the cause.
        retries: whether the same command runs the trial again.
        created: UTC, ISO 8601.
    """

    trial_id: str
    arm: str
    config: str
    seed: int
    stage: str
    error: str
    message: str
    outside: bool
    retries: bool
    traceback: str
    created: str


_FULL_BYTES = 16 * 2**20  # with less, an error of whatever kind is most likely a file that could not be written


def describe(error: BaseException, stage: str, about: TrialName, folder: Path) -> Failure:
    """Return what failure.json holds.

    `outside`: whether the outside world is the cause; `retries`: whether the same command runs the trial again.
    """
    failure: Failure = {
        "stage": stage,
        "error": type(error).__name__,
        "message": redact(error) + _advice(error, stage),
    }
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


def _is_same(failure: Failure, earlier: Failure) -> bool:
    """Return whether two failures are alike but for numbers, addresses and paths."""
    said, before = ((one.get("stage"), one.get("error"), one.get("message")) for one in (failure, earlier))
    return [_words(text) for text in said] == [_words(text) for text in before]


def _words(text: str | None) -> list[str]:
    return [word for word in str(text).split() if not re.search(r"[\d/]", word)]


def _read(path: Path) -> Failure:
    """Read a failure; empty where there is none, or it was cut off: the trial runs again."""
    try:
        failure = read_json(path)
    except (OSError, ValueError):
        return {}
    return Failure(**failure) if isinstance(failure, dict) else {}


def write_failure(folder: Path, failure: Failure) -> None:
    """Write failure.json; where that is impossible, too, the trial runs again without it."""
    with contextlib.suppress(OSError, MemoryError):
        write_json(folder / FAILURE_FILE, failure)


def set_aside(folder: Path) -> None:
    """Put the failure of an earlier run of the command aside: failure.json is of this run, or is not there."""
    with contextlib.suppress(FileNotFoundError):
        (folder / FAILURE_FILE).replace(folder / EARLIER)


def forget(folder: Path) -> None:
    """Delete what failed attempts left, since one succeeded."""
    for name in (FAILURE_FILE, EARLIER):
        (folder / name).unlink(missing_ok=True)


def own_failure(folder: Path) -> str:
    """Say how a trial failed where the outside world is not known to be the cause; empty elsewhere."""
    failure = _read(folder / FAILURE_FILE)
    return "" if failure.get("outside", failure.get("retries", True)) else _sentence(failure)


def standing_failure(folder: Path) -> str:
    """Say how a trial failed that is not run again by itself; empty where it is, or has not failed."""
    failure = _read(folder / FAILURE_FILE)
    return "" if failure.get("retries", True) else _sentence(failure)


def _sentence(failure: Failure) -> str:
    return f"{failure.get('stage')}: {failure.get('error')}: {failure.get('message')}"


_FILE = "live.jsonl"
_MAX_CURVES = 12
_FRESH_SECONDS = 120.0
_MAX_POINTS = 400


def note_step(folder: Path, step: int, total: int, loss: float | None) -> None:
    """Add a step to a trial's live log; what cannot be written is left out, and training goes on."""
    with contextlib.suppress(OSError), (folder / _FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, "total": total, "loss": loss}) + "\n")


def end_log(folder: Path) -> None:
    """Remove the log of a trial whose training has ended: train.jsonl says it all."""
    (folder / _FILE).unlink(missing_ok=True)


def running_curves(results: Path, *, now: float) -> list[dict[str, Any]]:
    """Return the losses so far of trials that train now: study, trial, arm, `steps`, `losses`, `total`.

    A log to which nothing was added for two minutes is that of a trial that was killed, and is left out; so is one from
    the future, which is what a clock that was set back leaves.
    """
    curves: list[dict[str, Any]] = []
    for path in sorted(results.glob(f"*/trials/*/{_FILE}")):
        if len(curves) == _MAX_CURVES or abs(now - path.stat().st_mtime) > _FRESH_SECONDS:
            continue
        rows = Reader(path.parent.parent.parent).rows(path)
        rows = [row for row in rows if isinstance(row.get("loss"), int | float)][-_MAX_POINTS:]
        if not rows:
            continue
        manifest = Reader(path.parent.parent.parent).mapping(path.parent / "manifest.json")
        about = {"study": path.parts[-4], "trial": path.parts[-2], "arm": str(manifest.get("arm", ""))}
        steps = {"steps": [row["step"] for row in rows], "losses": [row["loss"] for row in rows]}
        curves.append({**about, **steps, "total": rows[-1].get("total")})
    return curves


@dataclass(frozen=True)
class Outcome:
    """How a trial ended: `complete`, `diverged` or `failed`, with the message in the last two.

    `retries`: whether the same command runs it again where it failed.
    """

    trial_id: str
    arm: str
    config: str
    seed: int
    status: str
    message: str = ""
    retries: bool = True


STEP = "train/global_step"  # transformers' name: runs of stock TRL scripts share the axis
SPLIT_PREFIX = {"dev": "eval", "golden": "golden"}
