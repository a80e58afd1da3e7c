"""A trial's manifest: written with the hash of itself, so that a change of it shows. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.records import digest, read_json, write_json

_FILE, _HASH = "manifest.json", "sha256"


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write a trial's manifest, with its hash anew."""
    parts = {key: value for key, value in manifest.items() if key != _HASH}
    write_json(folder / _FILE, parts | {_HASH: digest(parts)})


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return a trial's manifest; empty where there is none that is as it was written: the trial runs again."""
    path = folder / _FILE
    try:
        manifest = read_json(path) if path.is_file() else {}
    except ValueError:  # cut off, or damaged
        return {}
    return manifest if isinstance(manifest, dict) and is_as_written(manifest) else {}


def is_as_written(manifest: Mapping[str, Any]) -> bool:
    """Return False for a manifest that was changed since it was written; older versions wrote no hash."""
    parts = {key: value for key, value in manifest.items() if key != _HASH}
    return _HASH not in manifest or manifest[_HASH] == digest(parts)
