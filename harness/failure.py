"""How a trial failed: what failure.json holds, and whether the sweep's command tries again by itself. Imports no torch.

What came from outside (a full disk, a machine out of memory, a worker that died, a command that asked for what is not
there) may be gone the next time, and the trial runs again. An error of the training itself would come back: it is told
until `retry_failed=true` asks for another attempt.
"""

from __future__ import annotations

import shutil
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness.records import UsageError, WorkerDiedError, read_json
from harness.redaction import redact

FILE = "failure.json"
_FROM_OUTSIDE = (OSError, MemoryError, UsageError, WorkerDiedError)
_FULL_BYTES = 16 * 2**20  # with less, an error of whatever kind is most likely a file that could not be written


def describe(error: Exception, stage: str, about: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return what failure.json holds; `retries`: whether the same command runs the trial again."""
    is_full = shutil.disk_usage(folder).free < _FULL_BYTES
    return about | {
        "stage": stage,
        "error": type(error).__name__,
        "message": redact(error) + _advice(error, stage),
        "retries": isinstance(error, _FROM_OUTSIDE) or is_full,
        "traceback": redact(traceback.format_exc()),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _advice(error: Exception, stage: str) -> str:
    if type(error).__name__ != "OutOfMemoryError":  # torch's; this module does without it
        return ""
    smaller = {"generate": "a smaller generate.batch_size", "heldout": "a smaller data.max_length"}
    return f"; try {smaller.get(stage, 'a GPU with more memory, or train.tuning=qlora')}"


def standing_failure(folder: Path) -> str:
    """Say how a trial failed that is not run again by itself; empty where it is, or has not failed."""
    try:
        failure = read_json(folder / FILE)
    except (OSError, ValueError):  # there is none, or it was cut off: the trial runs again
        return ""
    if not isinstance(failure, dict) or failure.get("retries", True):
        return ""
    return f"{failure.get('stage')}: {failure.get('error')}: {failure.get('message')}"
