"""What strains a verdict: scores per arm and the components of their difference -> one warning per cause, by name."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from harness.config.arms import title
from harness.decide.scores_file import ArmScores
from harness.decide.stats import Components, variance_test
from harness.decide.words import plural

MIN_SEEDS = 3
MIN_CLUSTERS = 30
MIN_SUCCESSES = 10
_UNEQUAL_RUNS = 0.04  # p of the F test: of studies whose arms vary alike, 4% are warned of
_MIN_PAIRS = 3  # of seeds, for a correlation


def doubts(arms: Mapping[str, ArmScores], found: Components, num_prompts: int | None = None) -> list[str]:
    """Return what strains the interval of a difference.

    Args:
        arms: the scores that decide, none of them missing.
        found: the components of their difference.
        num_prompts: prompts behind each score where a run has one score; None where it is not known.
    """
    return [
        *_run_warnings(arms),
        *_size_warnings(found),
        *_sampling_warnings(arms, num_prompts),
        *_spread_warnings(arms),
        *_success_warnings(arms, found.num_prompts),
    ]


def seed_correlation(arms: Mapping[str, ArmScores]) -> float | None:
    """Return the correlation of two arms' run means over the seeds that both have; None with fewer than three."""
    first, second = (arm.run_means for arm in arms.values())
    shared = [seed for seed in first if seed in second]
    if len(shared) < _MIN_PAIRS:
        return None
    means = np.array([[one[seed] for seed in shared] for one in (first, second)])
    if (np.ptp(means, axis=1) < 1e-9).any():
        return None
    return float(np.corrcoef(means)[0, 1])


def _run_warnings(arms: Mapping[str, ArmScores]) -> list[str]:
    """Warn of runs that scored as worst, and of a single seed in one of the arms."""
    warnings = []
    counts = {name: len(arm.seeds) for name, arm in arms.items()}
    if min(counts.values()) < 2 <= max(counts.values()):
        warnings.append(f"seeds an arm: {counts}; with a single seed in one, only checkpoints are compared")
    for name, arm in arms.items():
        warnings += [f"{name} seed {seed} {flag}: scored as worst, not dropped" for seed, flag in arm.flags.items()]
    return warnings


def _size_warnings(found: Components) -> list[str]:
    """Warn of samples so small that an interval rests on its assumptions more than on data."""
    warnings = []
    least = min(found.num_seeds)
    if 2 <= least < MIN_SEEDS:
        warnings.append(f"{least} seeds an arm: their variance is hardly known; use at least {MIN_SEEDS}, better 5")
    if found.num_prompts and found.effective_clusters < MIN_CLUSTERS:
        what = "prompts" if found.num_clusters == found.num_prompts else "clusters of prompts"
        unequal = round(found.effective_clusters, 1) < found.num_clusters
        worth = f" of unequal size, worth {found.effective_clusters:.1f} equal ones" if unequal else ""
        warnings.append(
            f"{found.num_clusters} golden {what}{worth}: too few to trust an interval; use at least {MIN_CLUSTERS}"
        )
    return warnings


def _sampling_warnings(arms: Mapping[str, ArmScores], num_prompts: int | None) -> list[str]:
    """Warn where a run has one score, so that the sampling of prompts is not in the interval, or only bounded."""
    if any(arm.prompts for arm in arms.values()):
        return []
    if num_prompts:
        return [
            f"a run has one score: the sampling of its {plural(num_prompts, 'prompt')} counts by a bound that takes "
            "the arms' prompts for different ones; rows by prompt (prompt_id) give a narrower interval"
        ]
    if min(len(arm.seeds) for arm in arms.values()) < 2:
        return [
            "one run in an arm, and no scores by prompt: nothing tells a difference from noise; give a row per prompt "
            "(prompt_id), several seeds an arm, or the number of prompts (--n-prompts, or a column n_prompts)"
        ]
    return [
        "a run has one score: the prompts were not sampled, so that other prompts may give another verdict; give a row "
        "per prompt (prompt_id), or the number of prompts (--n-prompts, or a column n_prompts)"
    ]


def _spread_warnings(arms: Mapping[str, ArmScores]) -> list[str]:
    """Warn where an F test says that the runs of one arm vary more than those of the other."""
    means = {name: arm.values.mean(1) for name, arm in arms.items()}
    if min(map(len, means.values())) < 2:
        return []
    low, high = sorted(means, key=lambda name: float(means[name].var(ddof=1)))
    spreads = {name: float(values.std(ddof=1)) for name, values in means.items()}
    counts = {name: np.array([len(values)]) for name, values in means.items()}
    p = variance_test(np.array([spreads[high] ** 2]), counts[high], np.array([spreads[low] ** 2]), counts[low])[0]
    if p >= _UNEQUAL_RUNS or spreads[high] < 1e-6:
        return []
    return [
        f"the runs of {title(high)} vary far more than those of {title(low)} (SD {100 * spreads[high]:.1f} against "
        f"{100 * spreads[low]:.1f} points): a mean says little of a method whose runs differ so; look at its single "
        "runs, and add seeds"
    ]


def _success_warnings(arms: Mapping[str, ArmScores], num_prompts: int) -> list[str]:
    """Warn of arms that pass, or fail, fewer than ten golden prompts, where scores are passes and fails."""
    warnings = []
    for name, arm in arms.items():
        if not num_prompts or (arm.prompts and not np.isin(arm.values, (0.0, 1.0)).all()):
            continue
        rate = float(arm.values.mean())
        what, count = ("passes", rate * num_prompts) if rate <= 0.5 else ("fails", (1 - rate) * num_prompts)
        if count < MIN_SUCCESSES:
            warnings.append(
                f"{title(name)} {what} {count:.3g} of {num_prompts} golden prompts on average: below {MIN_SUCCESSES} "
                "an interval is rough; use more golden prompts, or a scorer with degrees"
            )
    return warnings
