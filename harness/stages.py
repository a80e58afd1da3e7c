"""Which stages of a trial are done: those that its manifest names and whose files are still there, whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harness.fingerprints import WEIGHTS, changed_sizes
from harness.keep import DELETED
from harness.microbatch import is_outdated

_FILES = {"dev": ("completions.jsonl", "pairs.jsonl"), "golden": ("completions.jsonl", "pairs.jsonl")}


def done_stages(folder: Path, manifest: dict[str, Any]) -> set[str]:
    """Return the stages that need not run again; a file that was deleted or cut off takes its stage with it."""
    done = set(manifest.get("done", []))
    trained = any((folder / name).is_dir() for name in WEIGHTS) or bool(manifest.get(DELETED))
    changed = changed_sizes(folder, manifest.get("files", {}))
    lost = (
        not trained
        or _has_larger_micro_batch(folder, manifest)
        or any(name.partition("/")[0] in WEIGHTS for name in changed)
    )
    if "train" in done and lost and manifest.get("status") != "diverged":
        return set()
    for split, names in _FILES.items() if manifest.get("status") != "diverged" else ():
        if split in done and not all(_is_whole(folder / name) and name not in changed for name in names):
            done -= {split, "score"}
    if not _is_whole(folder / "scores.jsonl"):
        done.discard("score")
    return done


def _has_larger_micro_batch(folder: Path, manifest: dict[str, Any]) -> bool:
    """Whether a trial was trained with a larger micro-batch than others of its seed since."""
    return is_outdated(folder.parent.parent, manifest.get("seed"), manifest.get("micro_batch_size"))


def resume_stages(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """Return the stages that need not run again, and delete files that were cut off, so that no stage reads them."""
    done = done_stages(folder, manifest)
    for name in changed_sizes(folder, manifest.get("files", {})) & {"completions.jsonl", "pairs.jsonl"}:
        (folder / name).unlink(missing_ok=True)
    drop_cut_off(folder)
    return sorted(done)


def drop_cut_off(folder: Path) -> None:
    """Delete a trial's files of rows that were cut off: no stage may read half of one, and each is made again."""
    for path in folder.glob("*.jsonl"):
        if not _is_whole(path):
            path.unlink(missing_ok=True)


def _is_whole(path: Path) -> bool:
    """Return True where a JSON-lines file exists and ends with its last line's end; an empty one is whole."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        size = file.seek(0, 2)
        if size == 0:
            return True
        file.seek(size - 1)
        return file.read(1) == b"\n"
