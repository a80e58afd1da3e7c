"""What a trial's files were when their stage had ended: size and SHA-256, kept in its manifest."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from harness.records import file_sha256

# Scores may be made again, with more scorers, at any time: whoever writes them notes their hash anew (`harness.score`).
_ROWS = ("config.yaml", "train.jsonl", "completions.jsonl", "pairs.jsonl", "scores.jsonl")
WEIGHTS = ("adapter", "model")

# What nobody will read again is hashed up to this size, and beyond it compared by size: an adapter takes a tenth of a
# second, the full weights of a 7B model half a minute a trial. `python -m harness.verify` hashes everything.
READ_BYTES = 2**30


def fingerprints(folder: Path, known: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return `{path in the folder: {bytes, sha256}}`; weights that are known with the same size are not read again."""
    found = {}
    paths = [folder / name for name in _ROWS] + [p for name in WEIGHTS for p in sorted((folder / name).rglob("*"))]
    for path in paths:
        if not path.is_file():
            continue
        name = path.relative_to(folder).as_posix()
        old = known.get(name, {})
        is_known = name.partition("/")[0] in WEIGHTS and old.get("bytes") == path.stat().st_size
        found[name] = dict(old) if is_known else fingerprint(path)
    return found


def fingerprint(path: Path) -> dict[str, Any]:
    """Return a file's size and SHA-256."""
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def changed_files(folder: Path, known: Mapping[str, Any], *, read_bytes: float = READ_BYTES) -> set[str]:
    """Return which files are gone or are not what they were; those above `read_bytes` are compared by size alone."""
    return {n for n, file in known.items() if leads_out(n) or not _is_same(folder / n, file, read_bytes)}


def leads_out(name: str) -> bool:
    """Whether a name in a manifest is that of a file elsewhere: nobody's manifest says what else is read here."""
    return Path(name).is_absolute() or ".." in Path(name).parts


def _is_same(path: Path, file: Mapping[str, Any], read_bytes: float) -> bool:
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
