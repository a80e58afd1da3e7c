"""Which stages of a trial are done: those that its manifest names and whose files are still there, as they were."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from harness.fingerprints import READ_BYTES, WEIGHTS, changed_files
from harness.keep import DELETED
from harness.microbatch import is_outdated
from harness.records import read_jsonl
from harness.twins import put_back_known

_FILES = {"dev": ("completions.jsonl", "pairs.jsonl"), "golden": ("completions.jsonl", "pairs.jsonl")}


def done_stages(folder: Path, manifest: dict[str, Any], *, read_bytes: float = READ_BYTES) -> set[str]:
    """Return the stages that need not run again; a file that was deleted or damaged takes its stage with it.

    Args:
        folder: of the trial.
        manifest: its manifest.
        read_bytes: as in `harness.fingerprints.changed_files`.
    """
    done = set(manifest.get("done", []))
    known = manifest.get("files", {})
    trained = any((folder / name).is_dir() for name in WEIGHTS) or bool(manifest.get(DELETED))
    changed = changed_files(folder, known, read_bytes=read_bytes)
    lost = (
        not trained
        or _has_larger_micro_batch(folder, manifest)
        or any(name.partition("/")[0] in WEIGHTS for name in changed)
    )
    if "train" in done and lost and manifest.get("status") != "diverged":
        return set()

    def is_whole(name: str) -> bool:
        return name not in changed if name in known else _is_whole(folder / name)

    for split, names in _FILES.items() if manifest.get("status") != "diverged" else ():
        if split in done and not all(map(is_whole, names)):
            done -= {split, "score"}
    if not is_whole("scores.jsonl") or "config.yaml" in changed:  # the last stage, cheap, writes both
        done.discard("score")
    return done


def _has_larger_micro_batch(folder: Path, manifest: dict[str, Any]) -> bool:
    """Whether a trial was trained with a larger micro-batch than others of its seed since."""
    return is_outdated(folder.parent.parent, manifest.get("seed"), manifest.get("micro_batch_size"))


def resume_stages(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """Return the stages that need not run again, and delete damaged files, so that no stage reads them.

    Whatever is left to do may need the weights: they are hashed, however large.
    """
    done = done_stages(folder, manifest, read_bytes=math.inf)
    drop_damaged(folder, manifest)
    return sorted(done)


def drop_damaged(folder: Path, manifest: dict[str, Any]) -> None:
    """Delete a trial's damaged files of rows: no stage may read half of one, and each is made again.

    All but the log of the training, which only training would make again: it is put back from its twin.
    """
    known = manifest.get("files", {})
    put_back_known(folder / "train.jsonl", known.get("train.jsonl", {}))
    changed = changed_files(folder, known)
    for path in folder.glob("*.jsonl"):
        if path.name in changed or not (path.name in known or _is_whole(path)):
            path.unlink(missing_ok=True)


def _is_whole(path: Path) -> bool:
    """Return True where a JSON-lines file of which no hash is known exists and can be read to its last line's end."""
    try:
        with path.open("rb") as file:
            if size := file.seek(0, 2):
                file.seek(size - 1)
                if file.read(1) != b"\n":
                    return False
        return all(isinstance(row, dict) for row in read_jsonl(path))
    except (OSError, ValueError):
        return False
