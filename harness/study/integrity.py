"""Integrity of a trial's files: their size and SHA-256 in its manifest, and the stages that these leave done.

Also micro_batch.json, the micro-batch that a study settled for: a trial trained with a larger one is outdated.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, TypedDict

from harness.study.files import FileCache, FileRecord, Json, read_json, read_jsonl
from harness.study.manifest import Manifest

SPLITS = ("dev", "golden")
JOBS = ".jobs"  # folder of a study: trials as files for the workers of a launcher
WEIGHTS = ("adapter", "model")
MICRO_BATCH_FILE = "micro_batch.json"
DELETED: Final = "weights_deleted"  # in the manifest: the policy that deleted the weights

# Scores may be made again, with more scorers, at any time: each writer of them records their hash anew.
_ROW_FILES = ("config.yaml", "train.jsonl", "completions.jsonl", "pairs.jsonl", "scores.jsonl")
_SPLIT_FILES = ("completions.jsonl", "pairs.jsonl")

# Files that no stage reads again are hashed up to this size, and compared by size beyond it: an adapter takes a tenth
# of a second, the full weights of a 7B model half a minute per trial. `python -m harness.verify` hashes everything.
READ_BYTES = 2**30


def fingerprint(path: Path, files: FileCache | None = None) -> FileRecord:
    """Return a file's size and SHA-256."""
    return {"bytes": path.stat().st_size, "sha256": (files or FileCache()).sha256(path)}


def fingerprints(
    folder: Path, known: Mapping[str, FileRecord], files: FileCache | None = None
) -> dict[str, FileRecord]:
    """Return the record of each file of a trial by its name in the folder.

    Args:
        folder: of the trial.
        known: earlier records; weights of the same size are not read again.
        files: cache of this process; None reads each file anew.
    """
    files = files or FileCache()
    found = {}
    for path in _recorded_files(folder):
        name = path.relative_to(folder).as_posix()
        old = known.get(name) if _is_weights(name) else None
        found[name] = old if old and old["bytes"] == path.stat().st_size else fingerprint(path, files)
    return found


def _recorded_files(folder: Path) -> Iterator[Path]:
    yield from (path for name in _ROW_FILES if (path := folder / name).is_file())
    for name in WEIGHTS:
        yield from (path for path in sorted((folder / name).rglob("*")) if path.is_file())


def _is_weights(name: str) -> bool:
    return name.partition("/")[0] in WEIGHTS


def changed_files(
    folder: Path,
    known: Mapping[str, FileRecord],
    *,
    read_bytes: float = READ_BYTES,
    files: FileCache | None = None,
) -> set[str]:
    """Return the names of the files that are gone or changed.

    Args:
        folder: of the trial, or of a checkpoint.
        known: the records of its files.
        read_bytes: larger files are compared by size alone.
        files: cache of this process; None reads each file anew.
    """
    files = files or FileCache()
    return {
        name
        for name, record in known.items()
        if leads_out(name) or not _is_same(folder / name, record, read_bytes, files)
    }


def leads_out(name: str) -> bool:
    """Return whether a name in a manifest is that of a file outside the folder: such files are never read."""
    return Path(name).is_absolute() or ".." in Path(name).parts


def _is_same(path: Path, record: FileRecord, read_bytes: float, files: FileCache) -> bool:
    if not path.is_file():
        return False
    size = path.stat().st_size
    if size != record.get("bytes"):
        return False
    return size > read_bytes or files.sha256(path) == record.get("sha256")


def done_stages(
    folder: Path, manifest: Manifest, *, read_bytes: float = READ_BYTES, files: FileCache | None = None
) -> set[str]:
    """Return the stages that need not run again; a lost or damaged file takes its stage with it.

    Args:
        folder: of the trial.
        manifest: its manifest.
        read_bytes, files: as in `changed_files`.
    """
    done = set(manifest.get("done", []))
    if not done:
        return done
    known = manifest.get("files", {})
    changed = changed_files(folder, known, read_bytes=read_bytes, files=files)
    if "train" in done and _is_training_lost(folder, manifest, changed):
        return set()

    def is_whole(name: str) -> bool:
        return name not in changed if name in known else _has_whole_rows(folder / name)

    if manifest.get("status") != "diverged":
        for split in done & set(SPLITS):
            if not all(map(is_whole, _SPLIT_FILES)):
                done -= {split, "score"}
    if "score" in done and ("config.yaml" in changed or not is_whole("scores.jsonl")):  # cheap, writes both
        done.discard("score")
    return done


def _is_training_lost(folder: Path, manifest: Manifest, changed: set[str]) -> bool:
    """Return whether a trial must train again: its log or weights are gone, or its micro-batch is outdated."""
    if "train.jsonl" in changed:
        return True
    if manifest.get("status") == "diverged":  # it has no weights
        return False
    trained = any((folder / name).is_dir() for name in WEIGHTS) or bool(manifest.get(DELETED))
    outdated = is_outdated(folder.parent.parent, manifest.get("seed"), manifest.get("micro_batch_size"))
    return not trained or outdated or any(map(_is_weights, changed))


def resume_stages(folder: Path, manifest: Manifest, files: FileCache | None = None) -> list[str]:
    """Return the stages that need not run again, and delete damaged files, so that no stage reads them.

    The missing stages may need the weights: they are hashed, however large.
    """
    done = done_stages(folder, manifest, read_bytes=math.inf, files=files)
    drop_damaged(folder, manifest, files)
    return sorted(done)


def drop_damaged(folder: Path, manifest: Manifest, files: FileCache | None = None) -> None:
    """Delete a trial's damaged JSONL files: no stage may read half of one, and each is made again."""
    known = manifest.get("files", {})
    changed = changed_files(folder, known, files=files)
    for path in folder.glob("*.jsonl"):
        if path.name in changed or not (path.name in known or _has_whole_rows(path)):
            path.unlink(missing_ok=True)


def _has_whole_rows(path: Path) -> bool:
    """Return True for an existing JSONL file without a record that can be read to the end of its last line."""
    try:
        with path.open("rb") as file:
            if size := file.seek(0, 2):
                file.seek(size - 1)
                if file.read(1) != b"\n":
                    return False
        return all(isinstance(row, dict) for row in read_jsonl(path))
    except (OSError, ValueError):
        return False


def without_weights(manifest: Manifest, policy: str) -> Manifest:
    """Return the changed entries of a manifest whose weights are given up.

    They are written before the weights are deleted: a kill in between leaves superfluous weights, and no trial that
    looks damaged.
    """
    kept = {name: record for name, record in manifest.get("files", {}).items() if not _is_weights(name)}
    return {"files": kept, "weights_deleted": policy}


def delete_weights(folder: Path, manifest: Manifest) -> None:
    """Delete the weights of a trial whose manifest says that they are given up."""
    if manifest.get(DELETED):
        for name in WEIGHTS:
            shutil.rmtree(folder / name, ignore_errors=True)


class MicroBatch(TypedDict, total=False):
    """micro_batch.json, written where memory ran out; an empty mapping stands for none.

    Attributes:
        micro_batch_size: that the study settled for; `asked`: the configured one.
        seeds: the smallest micro-batch trained with by seed.
        halved: one mapping per time that memory ran out.
    """

    micro_batch_size: int
    asked: int | None
    seeds: dict[str, int]
    halved: list[dict[str, Json]]


def read_micro_batch(study: Path) -> MicroBatch:
    """Read micro_batch.json; one that was cut off is written anew when memory runs out again."""
    try:
        found = read_json(study / MICRO_BATCH_FILE)
    except (OSError, ValueError):
        return {}
    whole = isinstance(found, dict) and isinstance(found.get("micro_batch_size"), int)
    return MicroBatch(**found) if whole and isinstance(found.get("seeds"), dict) else {}


def settled(study: Path) -> int | None:
    """Return the micro-batch that a study had to settle for; None where it trains with the configured one."""
    return read_micro_batch(study).get("micro_batch_size")


def is_outdated(study: Path, seed: int | None, trained_with: int | None) -> bool:
    """Return whether a trial was trained with a larger micro-batch than another one of its seed."""
    smallest = read_micro_batch(study).get("seeds", {}).get(str(seed))
    return smallest is not None and isinstance(trained_with, int) and trained_with > smallest
