"""What a trial's files were when their stage had ended: size and SHA-256, kept in its manifest."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final

from harness.study.backup import put_back_known
from harness.study.files import FileRecord, file_sha256, read_json, read_jsonl
from harness.study.manifest import Manifest

# Scores may be made again, with more scorers, at any time: whoever writes them notes their hash anew (`harness.score`).
_ROWS = ("config.yaml", "train.jsonl", "completions.jsonl", "pairs.jsonl", "scores.jsonl")
WEIGHTS = ("adapter", "model")

# What nobody will read again is hashed up to this size, and beyond it compared by size: an adapter takes a tenth of a
# second, the full weights of a 7B model half a minute a trial. `python -m harness.verify` hashes everything.
READ_BYTES = 2**30


def fingerprints(folder: Path, known: Mapping[str, FileRecord]) -> dict[str, FileRecord]:
    """Return `{path in the folder: {bytes, sha256}}`; weights that are known with the same size are not read again."""
    found = {}
    paths = [folder / name for name in _ROWS] + [p for name in WEIGHTS for p in sorted((folder / name).rglob("*"))]
    for path in paths:
        if not path.is_file():
            continue
        name = path.relative_to(folder).as_posix()
        old = known.get(name) if name.partition("/")[0] in WEIGHTS else None
        found[name] = old if old and old["bytes"] == path.stat().st_size else fingerprint(path)
    return found


def fingerprint(path: Path) -> FileRecord:
    """Return a file's size and SHA-256."""
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def changed_files(folder: Path, known: Mapping[str, FileRecord], *, read_bytes: float = READ_BYTES) -> set[str]:
    """Return which files are gone or are not what they were; those above `read_bytes` are compared by size alone."""
    return {n for n, file in known.items() if leads_out(n) or not _is_same(folder / n, file, read_bytes)}


def leads_out(name: str) -> bool:
    """Whether a name in a manifest is that of a file elsewhere: nobody's manifest says what else is read here."""
    return Path(name).is_absolute() or ".." in Path(name).parts


def _is_same(path: Path, file: FileRecord, read_bytes: float) -> bool:
    if not path.is_file():
        return False
    about = path.stat()
    if about.st_size != file.get("bytes"):
        return False
    state = (about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns)
    return about.st_size > read_bytes or _sha256(path, state) == file.get("sha256")


@cache
def _sha256(path: Path, state: tuple[int, ...]) -> str:
    """Hash a file once in a process: each command asks several times how far its trials have come."""
    return file_sha256(path)


_FILES = {"dev": ("completions.jsonl", "pairs.jsonl"), "golden": ("completions.jsonl", "pairs.jsonl")}


def done_stages(folder: Path, manifest: Manifest, *, read_bytes: float = READ_BYTES) -> set[str]:
    """Return the stages that need not run again; a file that was deleted or damaged takes its stage with it.

    Args:
        folder: of the trial.
        manifest: its manifest.
        read_bytes: as in `harness.study.integrity.changed_files`.
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


def _has_larger_micro_batch(folder: Path, manifest: Manifest) -> bool:
    """Whether a trial was trained with a larger micro-batch than others of its seed since."""
    return is_outdated(folder.parent.parent, manifest.get("seed"), manifest.get("micro_batch_size"))


def resume_stages(folder: Path, manifest: Manifest) -> list[str]:
    """Return the stages that need not run again, and delete damaged files, so that no stage reads them.

    Whatever is left to do may need the weights: they are hashed, however large.
    """
    done = done_stages(folder, manifest, read_bytes=math.inf)
    drop_damaged(folder, manifest)
    return sorted(done)


def drop_damaged(folder: Path, manifest: Manifest) -> None:
    """Delete a trial's damaged files of rows: no stage may read half of one, and each is made again.

    All but the log of the training, which only training would make again: it is put back from its twin.
    """
    known = manifest.get("files", {})
    put_back_known(folder / "train.jsonl", known.get("train.jsonl"))
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


DELETED: Final = "weights_deleted"  # in the manifest: the policy that deleted them


def without_weights(manifest: Manifest, policy: str) -> Manifest:
    """Return the entries of a manifest that change where its weights are given up.

    They are written before the weights are deleted: a kill in between leaves weights too many, not a trial that looks
    damaged.
    """
    files = manifest.get("files", {})
    kept = {name: about for name, about in files.items() if name.partition("/")[0] not in WEIGHTS}
    return {"files": kept, "weights_deleted": policy}


def delete_weights(folder: Path, manifest: Manifest) -> None:
    """Delete the weights that the manifest says are deleted."""
    if manifest.get(DELETED):
        for name in WEIGHTS:
            shutil.rmtree(folder / name, ignore_errors=True)


MICRO_BATCH_FILE = "micro_batch.json"


def settled(study: Path) -> int | None:
    """Return the micro-batch that a study had to settle for; None where it trains with what was configured."""
    return read_micro_batch(study).get("micro_batch_size")


def is_outdated(study: Path, seed: Any, trained_with: Any) -> bool:
    """Whether a trial was trained with a larger micro-batch than another one of its seed."""
    smallest = read_micro_batch(study).get("seeds", {}).get(str(seed))
    return smallest is not None and isinstance(trained_with, int) and trained_with > smallest


def read_micro_batch(study: Path) -> dict[str, Any]:
    """Read the study's file; one that was cut off is written anew when memory runs out again."""
    try:
        found = read_json(study / MICRO_BATCH_FILE)
    except (OSError, ValueError):
        return {}
    whole = isinstance(found, dict) and isinstance(found.get("micro_batch_size"), int)
    return found if whole and isinstance(found.get("seeds"), dict) else {}


SPLITS = ("dev", "golden")
