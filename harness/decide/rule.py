"""The decision rule: scores in long form -> the contents of verdict.json (DESIGN, section 5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pandas as pd

from harness.decide.copies import drop_copies
from harness.decide.scores_file import ArmScores, arm_scores, checked, choose_metric, same_prompts
from harness.decide.planning import detectable, needed
from harness.decide.stats import Components, compare, compare_runs
from harness.decide.words import reason
from harness.study.decision import GuardResult, Verdict
from harness.study.errors import UsageError
from harness.study.registration import ALPHA, CONTRAST, MARGIN, Guard
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
    arms: tuple[str, str] = CONTRAST,
    cluster: str | None = None,
    guards: Sequence[Guard] = (),
) -> Verdict:
    """Apply the decision rule to scores in long form.

    Args:
        scores: columns `arm, seed, score`, optionally `config, split, prompt_id, scorer, cluster, unscored_reason,
            stage, flag`; scores in [0, 1], higher is better.
        metric: the scorer to decide on; may be left out where there is only one.
        margin: the smallest difference that matters, in (0, 1).
        alpha: error rate; `ci95` is the interval at 1 - alpha and `ci90` at 1 - 2 alpha.
        arms: the difference is the first arm's mean minus the second's.
        cluster: column with the prompts' clusters, if it is not `cluster`.
        guards: second metrics on which the winner must not be worse than the other arm by the guard's margin.

    Returns:
        The contents of verdict.json.

    Raises:
        UsageError: scores that cannot be compared; the message names arm, seed and prompt.
    """
    frame = checked(scores)
    metric = choose_metric(frame, metric, arms)
    deciding = deciding_scores(frame, metric, arms, cluster)
    frame, copied = drop_copies(frame, metric, deciding.configs)
    if copied:
        deciding = deciding_scores(frame, metric, arms, cluster)
    runs = deciding.arms
    kept, unscored_warnings = paired(runs)
    found = _components(kept)
    word, winner = decide_interval(found, arms=arms, margin=margin, alpha=alpha)
    n_unscored = {name: int(np.isnan(arm.values).sum()) for name, arm in runs.items()}
    warnings = [*copied, *deciding.warnings, *unscored_warnings, *_run_warnings(runs), *_size_warnings(found)]
    if any(n_unscored.values()):
        warnings += _bound_warnings(runs, word, arms=arms, margin=margin, alpha=alpha)
    tested = [_test_guard(frame, guard, winner, arms, deciding.configs, cluster, alpha) for guard in guards]
    failed = [guard for guard in tested if winner and not guard["passed"]]
    wide, narrow = found.interval(1 - alpha), found.interval(1 - 2 * alpha)
    result: Verdict = {
        "verdict": "trade-off" if failed else word,
        "level": "checkpoint" if min(found.num_seeds) < 2 else "method",
        "difference": found.difference,
        "ci95": list(wide),
        "ci90": list(narrow),
        "beyond_margin": bool(winner and min(abs(wide[0]), abs(wide[1])) > margin),
        "seed_variance": found.seed_variance,
        "prompt_variance": found.prompt_variance,
        "minimum_detectable_difference": detectable(found, alpha),
        "to_settle": needed(found, margin, alpha) if word == "inconclusive" else None,
        "metric": metric,
        "arms": list(arms),
        "margin": margin,
        "alpha": alpha,
        "configs": deciding.configs,
        "n_prompts": found.num_prompts,
        "n_clusters": found.num_clusters,
        "n_seeds": dict(zip(kept, found.num_seeds, strict=True)),
        "n_unscored": n_unscored,
        "means": {name: float(arm.values.mean()) for name, arm in kept.items()},
        "run_means": {name: arm.run_means for name, arm in kept.items()},
        "guards": tested,
        "warnings": warnings,
        "reason": "",
    }
    result["reason"] = reason(result, winner, failed)
    return result


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
    golden = _confirmed(frame[(frame["split"] == "golden") & (frame["scorer"] == metric)])
    dev = frame[(frame["split"] == "dev") & (frame["scorer"] == metric)]
    configs, warnings = {}, []
    for arm in arms:
        configs[arm], selected = _select_config(golden, dev, metric, arm)
        warnings += selected
    return DecidingScores(configs, _laid_out(golden, configs, cluster), warnings)


def _confirmed(golden: pd.DataFrame) -> pd.DataFrame:
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


def _laid_out(golden: pd.DataFrame, configs: Mapping[str, str], cluster: str | None) -> dict[str, ArmScores]:
    found = {arm: arm_scores(golden, arm, config, cluster) for arm, config in configs.items()}
    same_prompts(found)
    return found


def _components(arms: Mapping[str, ArmScores]) -> Components:
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


def _test_guard(
    frame: pd.DataFrame,
    guard: Guard,
    winner: str | None,
    arms: Sequence[str],
    configs: Mapping[str, str],
    cluster: str | None,
    alpha: float,
) -> GuardResult:
    """Test one-sided non-inferiority on a second metric: of the winner, or of the first arm where there is none."""
    metric, margin = str(guard["metric"]), float(guard["margin"])
    choose_metric(frame, metric)
    golden = _confirmed(frame[(frame["split"] == "golden") & (frame["scorer"] == metric)])
    kept, _ = paired(_laid_out(golden, configs, cluster))
    first = winner or arms[0]
    second = next(arm for arm in arms if arm != first)
    found = _components({first: kept[first], second: kept[second]})
    bound = found.lower_bound(alpha)
    return {
        "metric": metric,
        "margin": margin,
        "of": first,
        "difference": found.difference,
        "lower_bound": bound,
        "passed": bound > -margin,
    }


def paired(runs: Mapping[str, ArmScores]) -> tuple[dict[str, ArmScores], list[str]]:
    """Leave out prompts that any run has unscored, for all runs alike; return the rest, and warnings.

    Where a run has one score, the runs without one are left out instead.

    Raises:
        UsageError: fewer than two prompts, or fewer than two runs of one score, are left.
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
    if keep.sum() < 2:
        raise UsageError(
            f"scores: arm {name} has {keep.sum()} scored run{'' if keep.sum() == 1 else 's'} of {len(keep)} "
            f"(unscored: {gone}); at least two an arm are needed where a run has one score"
        )
    verb = "is" if (~keep).sum() == 1 else "are"
    warning = f"{name}: {(~keep).sum()} of {len(keep)} runs {verb} unscored and left out ({gone}; see unscored_reason)"
    return replace(arm, seeds=tuple(map(str, seeds[keep])), values=arm.values[keep]), [warning]


def _bound_warnings(
    runs: Mapping[str, ArmScores], decided: str, *, arms: Sequence[str], margin: float, alpha: float
) -> list[str]:
    """Warn where the missing scores, all 0 for one arm and all 1 for the other, would give another verdict."""
    others = {
        decide_interval(_components(_filled(runs, low)), arms=arms, margin=margin, alpha=alpha)[0] for low in runs
    }
    if others == {decided}:
        return []
    words = " or ".join(sorted(others))
    return [f"the missing scores could change the verdict: with 0 for one arm and 1 for the other it is {words}"]


def _filled(runs: Mapping[str, ArmScores], low: str) -> dict[str, ArmScores]:
    """Fill missing scores with 0 for the arm `low` and with 1 for the other: one extreme of the possible scores."""
    return {
        name: replace(arm, values=np.where(np.isnan(arm.values), 0.0 if name == low else 1.0, arm.values))
        for name, arm in runs.items()
    }


def _run_warnings(runs: Mapping[str, ArmScores]) -> list[str]:
    """Warn of runs that scored as worst, and of a single seed in one of the arms."""
    warnings = []
    counts = {name: len(arm.seeds) for name, arm in runs.items()}
    if min(counts.values()) < 2 <= max(counts.values()):
        warnings.append(f"seeds an arm: {counts}; with a single seed in one, only checkpoints are compared")
    for name, arm in runs.items():
        warnings += [f"{name} seed {seed} {flag}: scored as worst, not dropped" for seed, flag in arm.flags.items()]
    return warnings


def _size_warnings(found: Components) -> list[str]:
    """Warn of samples so small that an interval rests on its assumptions more than on data."""
    warnings = []
    least = min(found.num_seeds)
    if 2 <= least < MIN_SEEDS:
        warnings.append(f"{least} seeds an arm: their variance is hardly known; use at least {MIN_SEEDS}, better 5")
    if found.num_prompts and found.num_clusters < MIN_CLUSTERS:
        what = "prompts" if found.num_clusters == found.num_prompts else "clusters of prompts"
        warnings.append(
            f"{found.num_clusters} golden {what}: too few to trust an interval; use at least {MIN_CLUSTERS}"
        )
    return warnings
