"""Checkpoints of a trial in training: each sealed by a file that is written last; a trial resumes from the newest."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from harness.data.plan import ConsumedTokens
from harness.study.files import digest, read_json, write_json
from harness.study.integrity import changed_files, fingerprint

CONSUMED_FILE = "consumed.json"


class Schedule:
    """When a checkpoint is due: every so many steps, or else minutes.

    Args:
        steps: optimiser steps between two checkpoints; None goes by the minutes.
        minutes: between two checkpoints.
        clock: gives seconds.
    """

    def __init__(self, steps: int | None, minutes: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._steps, self._seconds, self._clock = steps, 60 * minutes, clock
        self._last = clock()

    def is_due(self, step: int) -> bool:
        """Return whether a checkpoint is due after this step; the minutes begin again where it is."""
        if self._steps is not None:
            return step % self._steps == 0
        now = self._clock()
        if now - self._last < self._seconds:
            return False
        self._last = now
        return True


def seal_checkpoint(checkpoint: Path, consumed: ConsumedTokens) -> None:
    """Write the consumption hash so far and the hash of each file, once all files are on the disk."""
    files = {}
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        files[path.relative_to(checkpoint).as_posix()] = fingerprint(path)
    found = {"state": consumed.state, "num_pairs": consumed.num_pairs, "files": files}
    write_json(checkpoint / CONSUMED_FILE, found | {"sha256": digest(found)})


def last_checkpoint(folder: Path) -> tuple[Path, ConsumedTokens] | None:
    """Return the newest complete checkpoint, with its consumption hash."""
    found = ((checkpoint, _consumed(checkpoint)) for checkpoint in reversed(checkpoints(folder)))
    return next(((checkpoint, consumed) for checkpoint, consumed in found if consumed), None)


def drop_broken(folder: Path) -> None:
    """Delete incomplete checkpoints: a library that writes into such a folder again reads the files in it."""
    for checkpoint in checkpoints(folder):
        if not _consumed(checkpoint):
            shutil.rmtree(checkpoint)


def _consumed(checkpoint: Path) -> ConsumedTokens | None:
    """Return the consumption hash of a checkpoint; None where it is incomplete or changed."""
    try:
        found = read_json(checkpoint / CONSUMED_FILE)
        is_sealed = found.pop("sha256") == digest(found)
    except (OSError, ValueError, KeyError, AttributeError):
        return None
    if not is_sealed or changed_files(checkpoint, found["files"], read_bytes=math.inf):
        return None
    return ConsumedTokens(found["state"], found["num_pairs"])


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder by their step, the oldest first."""
    return sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
