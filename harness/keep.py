"""Whose weights stay on disk (`keep=`): a trial's are deleted once it is scored, and its manifest says so.

Answers, scores and hashes stay in any case. Imports no torch.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.arms import ARMS
from harness.fingerprints import WEIGHTS
from harness.schema import RunConfig

DELETED = "weights_deleted"  # in the manifest: the policy that deleted them


def drops_weights(config: RunConfig, answered: Sequence[str]) -> bool:
    """Whether a trial that has answered these splits, and is scored, gives up its weights."""
    if config.cost_name:  # it was run for its seconds
        return True
    if config.keep == "all" or not ARMS[config.method.name].trainer:
        return False
    decides = "golden" in answered
    return bool(answered) and (config.keep == "none" or not decides)


def without_weights(manifest: Mapping[str, Any], policy: str) -> dict[str, Any]:
    """Return the entries of a manifest that change where its weights are given up.

    They are written before the weights are deleted: a kill in between leaves weights too many, not a trial that looks
    damaged.
    """
    files = manifest.get("files", {})
    kept = {name: about for name, about in files.items() if name.partition("/")[0] not in WEIGHTS}
    return {"files": kept, DELETED: policy}


def delete_weights(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Delete the weights that the manifest says are deleted."""
    if manifest.get(DELETED):
        for name in WEIGHTS:
            shutil.rmtree(folder / name, ignore_errors=True)
