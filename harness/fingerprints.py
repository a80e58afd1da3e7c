"""What a trial's files were when their stage had ended: size and SHA-256, kept in its manifest."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.records import file_sha256

# Scores are not among them: they may be made again, with more scorers, at any time.
_ROWS = ("train.jsonl", "completions.jsonl", "pairs.jsonl")
WEIGHTS = ("adapter", "model")


def fingerprints(folder: Path, known: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return `{path in the folder: {bytes, sha256}}`; weights that are known with the same size are not read again."""
    found = {}
    paths = [folder / name for name in _ROWS] + [p for name in WEIGHTS for p in sorted((folder / name).rglob("*"))]
    for path in paths:
        if not path.is_file():
            continue
        name, size = path.relative_to(folder).as_posix(), path.stat().st_size
        old = known.get(name, {})
        is_weight = name.partition("/")[0] in WEIGHTS
        sha256 = old["sha256"] if is_weight and old.get("bytes") == size else file_sha256(path)
        found[name] = {"bytes": size, "sha256": sha256}
    return found


def changed_sizes(folder: Path, known: Mapping[str, Any]) -> set[str]:
    """Return which files are gone or have another size than they had; costs no reading."""
    return {
        name
        for name, file in known.items()
        if not (folder / name).is_file() or (folder / name).stat().st_size != file.get("bytes")
    }
