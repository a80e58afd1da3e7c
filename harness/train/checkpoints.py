"""Checkpoints while a trial trains: sealed by a file that is written last, and resumed from where the seal holds."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path

from harness.data.plan import ConsumedTokens
from harness.study.files import digest, read_json, write_json
from harness.study.integrity import changed_files, fingerprint

CONSUMED_FILE = "consumed.json"


def seal_checkpoint(checkpoint: Path, consumed: ConsumedTokens) -> None:
    """Write what had been consumed by then and the hash of each file; all files are on the disk before."""
    files = {}
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        files[path.relative_to(checkpoint).as_posix()] = fingerprint(path)
    found = {"state": consumed.state, "num_pairs": consumed.num_pairs, "files": files}
    write_json(checkpoint / CONSUMED_FILE, found | {"sha256": digest(found)})


def last_checkpoint(folder: Path) -> tuple[Path, ConsumedTokens] | None:
    """Return the newest checkpoint that is whole, with the hash of what had been consumed by then."""
    whole = ((checkpoint, _consumed(checkpoint)) for checkpoint in reversed(checkpoints(folder)))
    return next(((checkpoint, consumed) for checkpoint, consumed in whole if consumed), None)


def drop_broken(folder: Path) -> None:
    """Delete checkpoints that are not whole: libraries that write into one again read what they find there."""
    for checkpoint in checkpoints(folder):
        if not _consumed(checkpoint):
            shutil.rmtree(checkpoint)


def _consumed(checkpoint: Path) -> ConsumedTokens | None:
    """Return what had been consumed at a checkpoint; None where it is not whole."""
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
