"""DPO's reference log-probs: computed once for a base and an answer, kept on disk, shared by trials and studies.

The key of an answer is what its log-prob depends on: the base's weights, dtype and kernel, and the ids of prompt and
answer. It never holds beta, learning rate, seed or LoRA initialisation, and not the label: pairs whose labels are
flipped, or that are drawn anew from the same answers, find theirs. TRL's own cache misses on every point of a grid.

A writer adds a file of its own under a temporary name and renames it, so that any number of them may write at once.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from harness.data.tokens import TokenisedPairs, TokenPair, canonical_bytes
from harness.study.files import digest
from harness.train.base import is_quantised
from harness.train.logps import pair_logps, why_padded

CHECKED_ROWS = 3
TOLERANCE = 1e-3  # nats per answer; float noise between batch shapes is below 1e-4 in fp32
_KEY_BYTES = 16


class StaleReferenceError(RuntimeError):
    """A cached reference is not what the base gives now."""


def reference_logps(
    pairs: TokenisedPairs, base: Any, *, base_sha256: str, pad_id: int, cache: Path, share_prefix: bool = True
) -> torch.Tensor:
    """Return the base's summed log-probs of all pairs; only answers that the cache does not have are computed.

    Some of the cached rows are computed again and compared.

    Args:
        pairs: the pairs.
        base: the SFT base's model.
        base_sha256: of its weights.
        pad_id: padding.
        cache: folder of all caches.
        share_prefix: as in `pair_logps`.

    Returns:
        float64, shape (num_pairs, 2): chosen, rejected.

    Raises:
        StaleReferenceError: where a cached value is not what the base gives.
    """
    kernel = base.config._attn_implementation if why_padded(base, pairs.rows, pad_id) else "packed"
    about = [base_sha256, str(base.dtype), kernel, base.device.type, torch.__version__]
    name = digest([*about, "nf4"] if is_quantised(base) else about)
    folder = cache / name[:32]
    known = _read(folder)
    keys = [[_key(row.prompt_ids, answer) for answer in (row.chosen_ids, row.rejected_ids)] for row in pairs.rows]
    found = np.array([[known.get(key, np.nan) for key in both] for both in keys]).reshape(-1, 2)
    missing = np.flatnonzero(np.isnan(found).any(axis=1))

    def compute(indices: Iterable[int], desc: str) -> np.ndarray:
        rows: list[TokenPair] = [pairs.rows[i] for i in indices]
        return pair_logps(base, rows, pad_id=pad_id, desc=desc, share_prefix=share_prefix).numpy()

    cached = np.setdiff1d(np.arange(len(keys)), missing)
    if len(cached):
        checked = np.random.default_rng(len(cached)).permutation(cached)[:CHECKED_ROWS]
        tolerance = TOLERANCE if base.dtype == torch.float32 else 100 * TOLERANCE
        if np.abs(found[checked] - compute(checked, "checking the reference")).max() > tolerance:
            raise StaleReferenceError(
                f"{folder}: the cached reference log-probs are not the base's; delete the folder and run again"
            )
    if len(missing):
        found[missing] = compute(missing, "reference log-probs")
        new = {key: value for i in missing for key, value in zip(keys[i], found[i], strict=True)}
        _write(folder, new)
    return torch.from_numpy(found)


def _key(prompt_ids: Iterable[int], answer_ids: Iterable[int]) -> bytes:
    return hashlib.sha256(canonical_bytes([*prompt_ids], [*answer_ids], [])).digest()[:_KEY_BYTES]


def _read(folder: Path) -> dict[bytes, float]:
    """Read all parts; one that is cut off or damaged counts as not there, and its answers are computed again."""
    known: dict[bytes, float] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "numpy") as file:
                sealed = (file.metadata() or {}).get("sha256")
                part = {name: file.get_tensor(name) for name in ("keys", "sums")}
        except (SafetensorError, OSError, UnicodeDecodeError):
            continue
        if sealed not in (None, _seal(part)):  # None: an older version wrote it
            continue
        known |= zip((row.tobytes() for row in part["keys"]), part["sums"].tolist(), strict=True)
    return known


def _write(folder: Path, sums: dict[bytes, float]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    keys = np.frombuffer(b"".join(sums), dtype=np.uint8).reshape(-1, _KEY_BYTES)
    name = hashlib.sha256(keys.tobytes()).hexdigest()[:32]
    temporary = folder / f".{name}.{os.getpid()}.tmp"
    part: dict[str, Any] = {"keys": keys, "sums": np.array(list(sums.values()), dtype=np.float64)}
    save_file(part, temporary, metadata={"sha256": _seal(part)})
    temporary.replace(folder / f"{name}.safetensors")


def _seal(part: dict[str, Any]) -> str:
    return hashlib.sha256(part["keys"].tobytes() + part["sums"].tobytes()).hexdigest()
