"""A trial's manifest: written twice, each time with the hash of itself, so that a damaged one is known and put back.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.study.backup import twin_of, write_twice
from harness.study.errors import UsageError
from harness.study.files import digest, read_json, to_json, write_text

FILE, _HASH = "manifest.json", "sha256"


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write a trial's manifest and its twin, with their hash."""
    parts = {key: value for key, value in manifest.items() if key != _HASH}
    write_twice(folder / FILE, to_json(parts | {_HASH: digest(parts)}))


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return a trial's manifest, without its hash; empty where neither copy is as it was written: it runs again."""
    found = _as_written(folder / FILE) or _as_written(twin_of(folder / FILE)) or {}
    return {key: value for key, value in found.items() if key != _HASH}


def load_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a trial that is there.

    Raises:
        UsageError: where neither copy of it is as it was written.
    """
    manifest = read_manifest(folder)
    if not manifest:
        raise UsageError(
            f"{folder / FILE}: is lost, damaged or was changed since its trial wrote it; run the sweep's command "
            "again, which runs the trial again"
        )
    return manifest


def put_back_manifest(folder: Path) -> bool:
    """Put a manifest back from its twin where it is not as it was written; return whether that was so."""
    path = folder / FILE
    if _as_written(path) or not _as_written(twin_of(path)):
        return False
    write_text(path, twin_of(path).read_text(encoding="utf-8"))
    return True


def is_as_written(manifest: object) -> bool:
    """Return False for a manifest that was changed since it was written; older versions wrote no hash."""
    if not isinstance(manifest, Mapping):
        return False
    parts = {key: value for key, value in manifest.items() if key != _HASH}
    return _HASH not in manifest or manifest[_HASH] == digest(parts)


def has_hash(manifest: Mapping[str, Any]) -> bool:
    """Return whether a manifest holds the hash of itself."""
    return _HASH in manifest


def _as_written(path: Path) -> dict[str, Any] | None:
    try:
        manifest = read_json(path) if path.is_file() else {}
    except (ValueError, OSError):  # cut off, or damaged
        return None
    return manifest if manifest and is_as_written(manifest) else None
