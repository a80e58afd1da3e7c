"""The decision rule: scores in long form in, the contents of verdict.json out (DESIGN, section 5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from harness.config.arms import ARMS
from harness.decide.scores_file import ArmScores, arm_scores, checked, choose_metric, same_prompts
from harness.decide.stats import Components, compare, compare_runs, needed
from harness.study.errors import UsageError
from harness.study.registration import ALPHA, MARGIN
from harness.study.scores_csv import MAX_UNSCORED

# Below these the interval's assumptions are strained; the verdict warns.
MIN_SEEDS = 3
MIN_CLUSTERS = 30


def verdict(
    scores: pd.DataFrame,
    *,
    metric: str | None = None,
    margin: float = MARGIN,
    alpha: float = ALPHA,
    arms: tuple[str, str] = ("simpo", "dpo"),
    cluster: str | None = None,
    guards: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Apply the decision rule to scores in long form.

    Args:
        scores: columns `arm, seed, score`, and where there are any `config, split, prompt_id, scorer, cluster,
            unscored_reason, stage, flag`; scores in [0, 1], higher is better.
        metric: the scorer to decide on; may be left out where there is only one.
        margin: the smallest difference that matters.
        alpha: error rate; `ci95` is the interval at 1 - alpha and `ci90` at 1 - 2 * alpha.
        arms: the difference is the first arm's mean minus the second's.
        cluster: column that holds the clusters, if it is not `cluster`.
        guards: `{metric, margin}`: the winner must not be worse than the other arm by as much as `margin`.

    Returns:
        The contents of verdict.json.

    Raises:
        UsageError: for scores that cannot be compared; the message names arm, seed and prompt.
    """
    frame = checked(scores)
    metric = choose_metric(frame, metric, arms)
    warnings: list[str] = []
    configs = _configs(frame, metric, arms, warnings)
    runs = _arrays(frame, metric, arms, configs, cluster)
    kept, unscored = paired(runs, warnings)
    found = _compare(kept)
    _warn_of_runs(runs, warnings)
    _warn_of_size(found, warnings)
    result = _decision(found, arms=arms, margin=margin, alpha=alpha)
    _bound_unscored(runs, unscored, result["verdict"], arms=arms, margin=margin, alpha=alpha, warnings=warnings)
    winner = result.pop("winner")
    checks = [_guard(frame, guard, winner, arms, configs, cluster, alpha) for guard in guards]
    failed = [guard for guard in checks if winner and not guard["passed"]]
    if failed:
        result["verdict"] = "trade-off"
    result |= {"metric": metric, "arms": list(arms), "margin": margin, "alpha": alpha, "configs": configs}
    result |= _counts(found, kept, unscored) | {"guards": checks, "warnings": warnings}
    return result | {"reason": reason(result, winner, failed)}


def _counts(found: Components, kept: Mapping[str, ArmScores], unscored: Mapping[str, int]) -> dict[str, Any]:
    return {
        "n_prompts": found.num_prompts,
        "n_clusters": found.num_clusters,
        "n_seeds": dict(zip(kept, found.num_seeds, strict=True)),
        "n_unscored": dict(unscored),
        "means": {name: float(arm.values.mean()) for name, arm in kept.items()},
        "run_means": {
            name: dict(zip(arm.seeds, arm.values.mean(1).tolist(), strict=True)) for name, arm in kept.items()
        },
    }


def _configs(frame: pd.DataFrame, metric: str, arms: Sequence[str], warnings: list[str]) -> dict[str, str]:
    """Return each arm's config; where golden has several, the best on dev by the mean over seeds."""
    golden = _confirmed(frame[(frame["split"] == "golden") & (frame["scorer"] == metric)])
    configs = {}
    for arm in arms:
        found = sorted(golden[golden["arm"] == arm]["config"].unique())
        if not found:
            known = ", ".join(sorted(golden["arm"].unique())) or "none"
            raise UsageError(f"scores: no golden rows of {metric} for arm {arm}; arms that have some: {known}")
        if len(found) > 1:
            dev = frame[(frame["split"] == "dev") & (frame["scorer"] == metric) & (frame["arm"] == arm)]
            means = dev[dev["config"].isin(found)].groupby("config")["score"].mean()
            if set(means.index) != set(found):
                raise UsageError(
                    f"scores: arm {arm} has {len(found)} configs on golden and dev scores for {len(means)}; "
                    "add dev rows to select on, or keep the golden rows of one config: golden must not select"
                )
            found = [str(means.idxmax())]
            warnings.append(f"{arm}: {found[0]} was selected on dev among {len(means)} configs, all scored on golden")
        configs[arm] = str(found[0])
    return configs


def _confirmed(golden: pd.DataFrame) -> pd.DataFrame:
    """Keep the rows of the confirm stage where there are any: fresh seeds decide, tuning seeds do not."""
    confirm = golden["stage"] == "confirm"
    return golden[confirm] if confirm.any() else golden


def _arrays(
    frame: pd.DataFrame, metric: str, arms: Sequence[str], configs: Mapping[str, str], cluster: str | None
) -> dict[str, ArmScores]:
    golden = _confirmed(frame[(frame["split"] == "golden") & (frame["scorer"] == metric)])
    found = {arm: arm_scores(golden, arm, configs[arm], cluster) for arm in arms}
    same_prompts(found)
    return found


def _compare(arms: Mapping[str, ArmScores]) -> Components:
    first, second = arms.values()
    try:
        if not first.prompts:
            return compare_runs(first.values[:, 0], second.values[:, 0])
        return compare(first.values, second.values, first.clusters)
    except ValueError as error:
        raise UsageError(f"scores: {error}") from error


def decide_interval(found: Components, *, arms: Sequence[str], margin: float, alpha: float) -> tuple[str, str | None]:
    """Return the verdict on a difference and the arm ahead: a tie before a winner, and neither without evidence."""
    wide, narrow = found.interval(1 - alpha), found.interval(1 - 2 * alpha)
    if -margin < narrow[0] and narrow[1] < margin:
        return "tie", None
    if wide[0] > 0 or wide[1] < 0:
        winner = arms[0] if found.difference > 0 else arms[1]
        return winner, winner
    return "inconclusive", None


def _decision(found: Components, *, arms: Sequence[str], margin: float, alpha: float) -> dict[str, Any]:
    wide, narrow = found.interval(1 - alpha), found.interval(1 - 2 * alpha)
    name, winner = decide_interval(found, arms=arms, margin=margin, alpha=alpha)
    return {
        "verdict": name,
        "winner": winner,
        "level": "checkpoint" if min(found.num_seeds) < 2 else "method",
        "difference": found.difference,
        "ci95": list(wide),
        "ci90": list(narrow),
        "beyond_margin": bool(winner and min(abs(wide[0]), abs(wide[1])) > margin),
        "seed_variance": found.seed_variance,
        "prompt_variance": found.prompt_variance,
        "minimum_detectable_difference": found.detectable(alpha),
        "to_settle": needed(found, margin, alpha) if name == "inconclusive" else None,
    }


def _bound_unscored(
    runs: Mapping[str, ArmScores],
    unscored: Mapping[str, int],
    decided: str,
    *,
    warnings: list[str],
    **rule: Any,
) -> None:
    """Warn where the missing scores, all 0 for one arm and all 1 for the other, would give another verdict."""
    if not any(unscored.values()):
        return
    others = {str(_decision(_compare(at_worst(runs, low)), **rule)["verdict"]) for low in runs}
    if others != {decided}:
        warnings.append(
            "the missing scores could change the verdict: with 0 for one arm and 1 for the other it is "
            + " or ".join(sorted(others))
        )


def _warn_of_runs(runs: Mapping[str, ArmScores], warnings: list[str]) -> None:
    """Warn of runs that scored as worst, and of arms with unlike numbers of seeds where one has a single seed."""
    counts = {name: len(arm.seeds) for name, arm in runs.items()}
    if min(counts.values()) < 2 <= max(counts.values()):
        warnings.append(f"seeds an arm: {counts}; with a single seed in one, only checkpoints are compared")
    for name, arm in runs.items():
        for seed, flag in arm.flags.items():
            warnings.append(f"{name} seed {seed} {flag}: scored as worst, not dropped")


def _warn_of_size(found: Components, warnings: list[str]) -> None:
    """Warn of samples so small that an interval rests on its assumptions more than on data."""
    least = min(found.num_seeds)
    if 2 <= least < MIN_SEEDS:
        warnings.append(f"{least} seeds an arm: their variance is hardly known; use at least {MIN_SEEDS}, better 5")
    if found.num_prompts and found.num_clusters < MIN_CLUSTERS:
        what = "prompts" if found.num_clusters == found.num_prompts else "clusters of prompts"
        warnings.append(
            f"{found.num_clusters} golden {what}: too few to trust an interval; use at least {MIN_CLUSTERS}"
        )


def _guard(
    frame: pd.DataFrame,
    guard: Mapping[str, Any],
    winner: str | None,
    arms: tuple[str, str],
    configs: Mapping[str, str],
    cluster: str | None,
    alpha: float,
) -> dict[str, Any]:
    """Test one-sided non-inferiority on a second metric: of the winner, or of the first arm where there is none."""
    metric, margin = str(guard["metric"]), float(guard["margin"])
    choose_metric(frame, metric)
    kept, _ = paired(_arrays(frame, metric, arms, configs, cluster), [])
    first = winner or arms[0]
    second = next(arm for arm in arms if arm != first)
    found = _compare({first: kept[first], second: kept[second]})
    bound = found.lower_bound(alpha)
    return {
        "metric": metric,
        "margin": margin,
        "of": first,
        "difference": found.difference,
        "lower_bound": bound,
        "passed": bound > -margin,
    }


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


def reason(result: Mapping[str, Any], winner: str | None, failed: Sequence[Mapping[str, Any]]) -> str:
    """Return the sentence.

    Args:
        result: the contents of verdict.json, all but `reason`.
        winner: the arm ahead, also where a guard makes it a trade-off; None for a tie or too little evidence.
        failed: the guards that it failed.
    """
    first, second = (ARMS[arm].title if arm in ARMS else arm for arm in result["arms"])
    low, high = (100 * bound for bound in result["ci95"])
    level = round(100 * (1 - result["alpha"]), 1)
    points, margin = 100 * result["difference"], 100 * result["margin"]
    seeds = "/".join(str(count) for count in dict.fromkeys(result["n_seeds"].values()))
    over = f" over {result['n_prompts']} golden prompts" if result["n_prompts"] else ""
    runs = "1 seed" if seeds == "1" else f"{seeds} seeds"
    basis = f"on {result['metric']} ({level:g}% interval {low:+.1f} to {high:+.1f}){over}, {runs} an arm"
    if result["level"] == "checkpoint":
        first, second = f"this {first} checkpoint", f"this {second} checkpoint"
    if winner:
        better, worse = (first, second) if points > 0 else (second, first)
        text = f"{better} beats {worse} by {abs(points):.1f} points {basis}"
        if failed:
            text += f"; but it may be worse on {', '.join(str(guard['metric']) for guard in failed)}"
    elif result["verdict"] == "tie":
        text = f"{first} and {second} differ by less than {margin:g} points: {points:+.1f} {basis}"
    else:
        least = 100 * result["minimum_detectable_difference"]
        text = f"Not enough evidence: {first} minus {second} is {points:+.1f} points {basis}; "
        text += f"a difference below {least:.1f} points cannot be told from noise here"
    if result["level"] == "checkpoint":
        text += "; with one seed this says nothing about the methods"
    return text[0].upper() + text[1:] + "."
