"""What to do where a prompt has no score: never 0, never dropped without a count."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from harness.records import UsageError
from harness.scores_file import ArmScores

MAX_UNSCORED = 0.01


def paired(runs: Mapping[str, ArmScores], warnings: list[str]) -> tuple[dict[str, ArmScores], dict[str, int]]:
    """Leave out prompts that any run has unscored, for all runs alike, and say so.

    Where a run has one score, the runs without one are left out instead.

    Raises:
        UsageError: where fewer than two prompts, or fewer than two runs of one score, are left.
    """
    unscored = {name: int(np.isnan(arm.values).sum()) for name, arm in runs.items()}
    if not any(arm.prompts for arm in runs.values()):
        return {name: _scored_runs(name, arm, warnings) for name, arm in runs.items()}, unscored
    keep = ~np.any([np.isnan(arm.values).any(0) for arm in runs.values()], axis=0)
    if keep.all():
        return dict(runs), unscored
    if keep.sum() < 2:
        raise UsageError("scores: fewer than two prompts are scored in all runs; see unscored_reason")
    warnings.append(f"{(~keep).sum()} of {len(keep)} prompts are unscored in some run and left out of all runs")
    for name, arm in runs.items():
        share = unscored[name] / arm.values.size
        if share > MAX_UNSCORED:
            warnings.append(f"{name}: {share:.1%} of its scores are missing, more than {MAX_UNSCORED:.0%}")
    return {
        name: replace(
            arm,
            prompts=tuple(np.array(arm.prompts)[keep]),
            values=arm.values[:, keep],
            clusters=arm.clusters[keep],
        )
        for name, arm in runs.items()
    }, unscored


def _scored_runs(name: str, arm: ArmScores, warnings: list[str]) -> ArmScores:
    """Leave out the runs of an arm whose one score is missing, and say so."""
    keep = ~np.isnan(arm.values[:, 0])
    if keep.all():
        return arm
    seeds, gone = np.array(arm.seeds), f"seed {', '.join(np.array(arm.seeds)[~keep])}"
    if keep.sum() < 2:
        raise UsageError(
            f"scores: arm {name} has {keep.sum()} scored run{'' if keep.sum() == 1 else 's'} of {len(keep)} "
            f"(unscored: {gone}); at least two an arm are needed where a run has one score"
        )
    verb = "is" if (~keep).sum() == 1 else "are"
    warnings.append(
        f"{name}: {(~keep).sum()} of {len(keep)} runs {verb} unscored and left out ({gone}; see unscored_reason)"
    )
    return replace(arm, seeds=tuple(map(str, seeds[keep])), values=arm.values[keep])


def at_worst(runs: Mapping[str, ArmScores], low: str) -> dict[str, ArmScores]:
    """Fill missing scores with 0 for the arm `low` and with 1 for the other: one end of what they could have been."""
    return {
        name: replace(arm, values=np.where(np.isnan(arm.values), 0.0 if name == low else 1.0, arm.values))
        for name, arm in runs.items()
    }
