"""Outcome of a trial: complete, diverged or failed; failure.json; live.jsonl, the losses of a running trial.

After an error of the outside world (`harness.study.errors`) the same command runs the trial again. No list of those
errors is complete: any other error stands only after it has come back in a second run of the command. A standing
failure is reported until `retry_failed=true` asks for another attempt.
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
from typing import TypedDict

from harness.study.errors import UsageError, is_out_of_memory, is_outside, meaning
from harness.study.files import Reader, read_json, write_json
from harness.study.rows import TrialName
from harness.study.text import redact

FAILURE_FILE = "failure.json"
LIVE_FILE = "live.jsonl"
EARLIER = "earlier_failure.json"  # the last failure before this run of the command, for comparison
STEP = "train/global_step"  # transformers' name: runs of stock TRL scripts share the axis
SPLIT_PREFIX = {"dev": "eval", "golden": "golden"}
_FULL_BYTES = 16 * 2**20  # with less free space, any error is most likely a failed write
_MAX_CURVES = 12
_MAX_POINTS = 400
_FRESH_SECONDS = 120.0


@dataclass(frozen=True)
class Outcome:
    """How a trial ended.

    Attributes:
        status: `complete`, `diverged` or `failed`.
        message: why it diverged or failed.
        retries: whether the same command runs a failed trial again.
    """

    trial_id: str
    arm: str
    config: str
    seed: int
    status: str
    message: str = ""
    retries: bool = True


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


def describe(error: BaseException, stage: str, about: TrialName, folder: Path) -> Failure:
    """Return the contents of failure.json.

    Args:
        error: that ended the trial.
        stage: in which it was raised.
        about: the trial.
        folder: of the trial.
    """
    failure: Failure = {
        "stage": stage,
        "error": type(error).__name__,
        "message": redact(error) + _advice_on(error, stage),
    }
    outside = is_outside(error) or _is_disk_full(folder)
    return {
        **about,
        **failure,
        "outside": outside,
        # A refusal costs little, and what it asks for (another version of a library) may not show in the trial's id.
        "retries": outside
        or isinstance(error, UsageError)
        or not _is_same_failure(failure, _read_failure(folder / EARLIER)),
        "traceback": redact("".join(traceback.format_exception(error))),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _advice_on(error: BaseException, stage: str) -> str:
    means = meaning(error)
    if is_out_of_memory(error) and not means:
        smaller = {"generate": "a smaller generate.batch_size", "heldout": "a smaller data.max_length"}
        return f"; try {smaller.get(stage, 'a GPU with more memory, or train.tuning=qlora')}"
    return f"; {means}" if means else ""


def _is_disk_full(folder: Path) -> bool:
    try:
        return shutil.disk_usage(folder).free < _FULL_BYTES
    except OSError:  # the folder is gone
        return True


def _is_same_failure(failure: Failure, earlier: Failure) -> bool:
    """Return whether two failures are equal, numbers, addresses and paths left out."""
    said, before = ((one.get("stage"), one.get("error"), one.get("message")) for one in (failure, earlier))
    return [_stable_words(text) for text in said] == [_stable_words(text) for text in before]


def _stable_words(text: str | None) -> list[str]:
    return [word for word in str(text).split() if not re.search(r"[\d/]", word)]


def _read_failure(path: Path) -> Failure:
    """Read a failure; empty for an absent or damaged file: the trial runs again."""
    try:
        failure = read_json(path)
    except (OSError, ValueError):
        return {}
    return Failure(**failure) if isinstance(failure, dict) else {}


def write_failure(folder: Path, failure: Failure) -> None:
    """Write failure.json; if even that fails, the trial runs again without it."""
    with contextlib.suppress(OSError, MemoryError):
        write_json(folder / FAILURE_FILE, failure)


def set_aside(folder: Path) -> None:
    """Rename the failure of an earlier run of the command: failure.json is of this run, or absent."""
    with contextlib.suppress(FileNotFoundError):
        (folder / FAILURE_FILE).replace(folder / EARLIER)


def forget(folder: Path) -> None:
    """Delete the failures of earlier attempts after one succeeded."""
    for name in (FAILURE_FILE, EARLIER):
        (folder / name).unlink(missing_ok=True)


def own_failure(folder: Path) -> str:
    """Describe a failure that the outside world did not cause; empty otherwise."""
    failure = _read_failure(folder / FAILURE_FILE)
    return "" if failure.get("outside", failure.get("retries", True)) else _failure_sentence(failure)


def standing_failure(folder: Path) -> str:
    """Describe a failure that stands: the same command does not run the trial again; empty otherwise."""
    failure = _read_failure(folder / FAILURE_FILE)
    return "" if failure.get("retries", True) else _failure_sentence(failure)


def refusal(folder: Path) -> str:
    """Return the sentence with which a trial was refused as the user's own to mend; empty otherwise."""
    failure = _read_failure(folder / FAILURE_FILE)
    return str(failure.get("message", "")) if failure.get("error") == UsageError.__name__ else ""


def _failure_sentence(failure: Failure) -> str:
    return f"{failure.get('stage')}: {failure.get('error')}: {failure.get('message')}"


def note_step(folder: Path, step: int, total: int, loss: float | None) -> None:
    """Add a step to live.jsonl; training goes on where it cannot be written."""
    with contextlib.suppress(OSError), (folder / LIVE_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, "total": total, "loss": loss}) + "\n")


def end_log(folder: Path) -> None:
    """Delete live.jsonl after the training: train.jsonl holds all steps."""
    (folder / LIVE_FILE).unlink(missing_ok=True)


class LiveCurve(TypedDict):
    """The losses of one trial in training, by step; `total` is the number of steps of the whole training."""

    study: str
    trial: str
    arm: str
    steps: list[int]
    losses: list[float]
    total: int | None


def running_curves(results: Path, *, now: float) -> list[LiveCurve]:
    """Return the losses so far of all trials in training.

    A log without a new step for two minutes is of a killed trial and is left out; so is one with a date in the future,
    which a clock that was set back leaves.

    Args:
        results: folder of all studies.
        now: seconds since the epoch.
    """
    curves: list[LiveCurve] = []
    for path in sorted(results.glob(f"*/trials/*/{LIVE_FILE}")):
        if len(curves) == _MAX_CURVES or abs(now - path.stat().st_mtime) > _FRESH_SECONDS:
            continue
        rows = Reader(path.parent.parent.parent).rows(path)
        rows = [row for row in rows if isinstance(row.get("loss"), int | float)][-_MAX_POINTS:]
        if not rows:
            continue
        manifest = Reader(path.parent.parent.parent).mapping(path.parent / "manifest.json")
        curves.append(
            {
                "study": path.parts[-4],
                "trial": path.parts[-2],
                "arm": str(manifest.get("arm", "")),
                "steps": [row["step"] for row in rows],
                "losses": [row["loss"] for row in rows],
                "total": rows[-1].get("total"),
            }
        )
    return curves
