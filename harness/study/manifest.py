"""A trial's manifest: written twice, each time with the hash of itself, so that a damaged one is known and put back.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from harness.study.backup import twin_of, write_twice
from harness.study.errors import UsageError
from harness.study.files import FileRecord, digest, read_json, to_json, write_text

FILE, _HASH = "manifest.json", "sha256"


class Provenance(TypedDict):
    """What a trial ran on: versions of the packages, commit (None outside a checkout), hardware."""

    versions: dict[str, str]
    commit: str | None
    hardware: dict[str, Any]


class Manifest(TypedDict, total=False):
    """manifest.json of a trial; each stage adds its keys, and an empty mapping stands for a trial without one.

    Attributes:
        trial_id, arm, config, seed: the trial.
        status: `running`, `complete` or `diverged`, the last with `divergence`.
        flags: `diverged` or `collapsed`.
        done: the finished stages: `train`, `dev`, `golden`, `score`.
        method, engine, reference: settings of the training.
        versions, commit, hardware: of the process that trained.
        seconds, peak_memory_bytes: by stage.
        tokens: `train` and `generated`.
        base_sha256, data_sha256, batch_plan_sha256: of the base's weights, of token ids and masks, of the batch plan.
        consumed_tokens_sha256, expected_tokens_sha256: of the token ids that the trainer read, and of the plan's.
        pairs: number of pairs by split; `dropped_pairs`: number by split and reason.
        padding_share: of all positions.
        packed, why_padded: whether sequences were packed, and why not.
        files: each file by its name in the trial's folder.
        degenerate: shares of degenerate answers by split and kind.
        weights_deleted: the policy that deleted the weights (`keep`).
        source: file of the answers where another tool generated them.
        sha256: the seal.
    """

    trial_id: str
    arm: str
    config: str
    seed: int
    status: str
    divergence: str
    flags: list[str]
    done: list[str]
    method: dict[str, Any]
    engine: str
    reference: str
    versions: dict[str, str]
    commit: str | None
    hardware: dict[str, Any]
    warnings: list[str]
    seconds: dict[str, float]
    peak_memory_bytes: dict[str, int]
    tokens: dict[str, int]
    created: str
    base_sha256: str
    data_sha256: str
    batch_plan_sha256: str
    consumed_tokens_sha256: str
    expected_tokens_sha256: str
    pairs: dict[str, int]
    dropped_pairs: dict[str, dict[str, int]]
    label_noise: dict[str, Any]
    micro_batch_size: int
    padding_share: float
    parameters: dict[str, int]
    packed: bool
    why_padded: str
    files: dict[str, FileRecord]
    degenerate: dict[str, dict[str, float]]
    weights_deleted: str
    source: dict[str, str]
    sha256: str


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write a trial's manifest and its twin, with their hash."""
    parts = {key: value for key, value in manifest.items() if key != _HASH}
    write_twice(folder / FILE, to_json(parts | {_HASH: digest(parts)}))


def read_manifest(folder: Path) -> Manifest:
    """Return a trial's manifest, without its hash; empty where neither copy is as it was written: it runs again."""
    found = _as_written(folder / FILE) or _as_written(twin_of(folder / FILE)) or Manifest()
    found.pop("sha256", None)
    return found


def load_manifest(folder: Path) -> Manifest:
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


def _as_written(path: Path) -> Manifest | None:
    try:
        manifest: Manifest = read_json(path) if path.is_file() else {}
    except (ValueError, OSError):  # cut off, or damaged
        return None
    return manifest if manifest and is_as_written(manifest) else None
