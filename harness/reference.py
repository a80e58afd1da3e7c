"""DPO's reference log-probs: computed once for a base and a set of ids, kept on disk, shared by trials and studies.

The key never holds beta, learning rate, seed or LoRA initialisation: the reference does not depend on them. TRL's own
cache does, and so misses on every point of a grid.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from harness.logps import pair_logps
from harness.records import digest
from harness.tokens import TokenisedPairs

CHECKED_ROWS = 2
TOLERANCE = 1e-3  # nats per answer; float noise between batch shapes is below 1e-4 in fp32


class StaleReferenceError(RuntimeError):
    """A cached reference is not what the base gives now."""


def reference_logps(
    pairs: TokenisedPairs, load_base: Callable[[], Any], *, base_sha256: str, pad_id: int, cache: Path
) -> torch.Tensor:
    """Return the base's summed log-probs of all pairs, from the cache where it has them.

    A cached file is checked on use: a few rows are computed again.

    Returns:
        float64, shape (num_pairs, 2): chosen, rejected.

    Raises:
        StaleReferenceError: where a cached value is not what the base gives.
    """
    base = load_base()
    key = digest([base_sha256, pairs.sha256, str(base.dtype), base.config._attn_implementation, torch.__version__])
    path = cache / f"{key[:32]}.safetensors"
    if path.is_file():
        logps = load_file(path)["logps"]
        fresh = pair_logps(base, pairs.rows[:CHECKED_ROWS], pad_id=pad_id, desc="checking the reference")
        tolerance = TOLERANCE if base.dtype == torch.float32 else 100 * TOLERANCE
        if len(logps) != len(pairs.rows) or (logps[:CHECKED_ROWS] - fresh).abs().max() > tolerance:
            raise StaleReferenceError(
                f"{path}: the cached reference log-probs are not the base's; delete the file and run again"
            )
        return logps
    logps = pair_logps(base, pairs.rows, pad_id=pad_id, desc="reference log-probs")
    cache.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    save_file({"logps": logps}, temporary)
    temporary.replace(path)
    return logps
