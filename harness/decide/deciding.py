"""Which golden scores decide: config and scores per arm on the same prompts, unscored ones left out for all runs alike.

Checked scores in long form -> arrays per arm -> the components of a difference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pandas as pd

from harness.decide.scores_file import ArmScores, arm_scores, same_prompts
from harness.decide.stats import Components, Interval, compare, compare_runs
from harness.study.errors import UsageError
from harness.study.scores_csv import MAX_UNSCORED


class DecidingScores(NamedTuple):
    """The golden scores that decide: config and scores per arm, on the same prompts, and warnings of a selection."""

    configs: dict[str, str]
    arms: dict[str, ArmScores]
    warnings: list[str]


def deciding_scores(
    frame: pd.DataFrame, metric: str, arms: Sequence[str], cluster: str | None = None
) -> DecidingScores:
    """Return the golden scores that decide: the confirm stage's where there are any, of one config per arm.

    Args:
        frame: checked scores (`harness.decide.scores_file.checked`).
        metric: the scorer.
        arms: the arms that are compared.
        cluster: column with the prompts' clusters, if it is not `cluster`.

    Raises:
        UsageError: an arm without golden scores, several configs without dev scores, or different prompts.
    """
    golden = confirmed(frame[(frame["split"] == "golden") & (frame["scorer"] == metric)])
    dev = frame[(frame["split"] == "dev") & (frame["scorer"] == metric)]
    configs, warnings = {}, []
    for arm in arms:
        configs[arm], selected = _select_config(golden, dev, metric, arm)
        warnings += selected
    return DecidingScores(configs, laid_out(golden, configs, cluster), warnings)


def confirmed(golden: pd.DataFrame) -> pd.DataFrame:
    """Keep the rows of the confirm stage where there are any: fresh seeds decide, tuning seeds do not."""
    confirm = golden["stage"] == "confirm"
    return golden[confirm] if confirm.any() else golden


def _select_config(golden: pd.DataFrame, dev: pd.DataFrame, metric: str, arm: str) -> tuple[str, list[str]]:
    """Return an arm's config; where golden has several, the best on dev by the mean over seeds, with a warning."""
    found = sorted(golden[golden["arm"] == arm]["config"].unique())
    if not found:
        known = ", ".join(sorted(golden["arm"].unique())) or "none"
        raise UsageError(f"scores: no golden rows of {metric} for arm {arm}; arms that have some: {known}")
    if len(found) == 1:
        return str(found[0]), []
    means = dev[(dev["arm"] == arm) & dev["config"].isin(found)].groupby("config")["score"].mean()
    if set(means.index) != set(found):
        raise UsageError(
            f"scores: arm {arm} has {len(found)} configs on golden and dev scores for {len(means)}; "
            "add dev rows to select on, or keep the golden rows of one config: golden must not select"
        )
    best = str(means.idxmax())
    return best, [f"{arm}: {best} was selected on dev among {len(means)} configs, all scored on golden"]


def laid_out(golden: pd.DataFrame, configs: Mapping[str, str], cluster: str | None) -> dict[str, ArmScores]:
    """Return one config's scores per arm, as arrays over the same prompts.

    Raises:
        UsageError: as in `arm_scores` and `same_prompts`.
    """
    found = {arm: arm_scores(golden, arm, config, cluster) for arm, config in configs.items()}
    same_prompts(found)
    return found


def components_of_arms(arms: Mapping[str, ArmScores], num_prompts: int | None = None) -> Components:
    """Return the components of the difference of two arms, first minus second.

    Args:
        arms: two arms' scores, none of them missing.
        num_prompts: prompts behind each score, where a run has one score and their number is known.

    Raises:
        UsageError: too few prompts or clusters.
    """
    first, second = arms.values()
    try:
        if not first.prompts:
            return compare_runs(first.values[:, 0], second.values[:, 0], num_prompts)
        return compare(first.values, second.values, first.clusters)
    except ValueError as error:
        raise UsageError(f"scores: {error}") from error


def decide_interval(found: Interval, *, arms: Sequence[str], margin: float, alpha: float) -> tuple[str, str | None]:
    """Return the verdict on a difference and the arm ahead: a tie before a winner, and neither without evidence."""
    wide, narrow = found.interval(1 - alpha), found.interval(1 - 2 * alpha)
    if -margin < narrow[0] and narrow[1] < margin:
        return "tie", None
    if wide[0] > 0 or wide[1] < 0:
        winner = arms[0] if found.difference > 0 else arms[1]
        return winner, winner
    return "inconclusive", None


def paired(runs: Mapping[str, ArmScores]) -> tuple[dict[str, ArmScores], list[str]]:
    """Leave out prompts that any run has unscored, for all runs alike; return the rest, and warnings.

    Where a run has one score, the runs without one are left out instead.

    Raises:
        UsageError: fewer than two prompts, or no run of one score, is left.
    """
    warnings: list[str] = []
    if not any(arm.prompts for arm in runs.values()):
        kept = {}
        for name, arm in runs.items():
            kept[name], missing = _scored_runs(name, arm)
            warnings += missing
        return kept, warnings
    keep = ~np.any([np.isnan(arm.values).any(0) for arm in runs.values()], axis=0)
    if keep.all():
        return dict(runs), []
    if keep.sum() < 2:
        raise UsageError("scores: fewer than two prompts are scored in all runs; see unscored_reason")
    warnings.append(f"{(~keep).sum()} of {len(keep)} prompts are unscored in some run and left out of all runs")
    for name, arm in runs.items():
        share = int(np.isnan(arm.values).sum()) / arm.values.size
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
    }, warnings


def _scored_runs(name: str, arm: ArmScores) -> tuple[ArmScores, list[str]]:
    """Leave out the runs of an arm whose one score is missing; return the rest, and a warning."""
    keep = ~np.isnan(arm.values[:, 0])
    if keep.all():
        return arm, []
    seeds, gone = np.array(arm.seeds), f"seed {', '.join(np.array(arm.seeds)[~keep])}"
    if not keep.any():
        raise UsageError(f"scores: arm {name} has no scored run of {len(keep)} (unscored: {gone}); score one at least")
    verb = "is" if (~keep).sum() == 1 else "are"
    warning = f"{name}: {(~keep).sum()} of {len(keep)} runs {verb} unscored and left out ({gone}; see unscored_reason)"
    return replace(arm, seeds=tuple(map(str, seeds[keep])), values=arm.values[keep]), [warning]
