"""What a study will find: components of its variance -> power, detectable difference, seeds and prompts needed.

The interval's width is itself random. Its distribution is drawn, always from the same random numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from scipy.special import ndtr

from harness.decide.stats import Arm, Components, Parts, half_widths, total_variance

POWER = 0.8
_DRAWS = 2000
_MOST = 1.0  # a difference of scores in [0, 1]


def power(components: Components, difference: float, alpha: float) -> float:
    """Return how often the two-sided test at `alpha` finds this true difference, in its direction.

    Args:
        components: what is true of the studies: their variances are taken as known.
        difference: the true difference, above zero.
        alpha: error rate.
    """
    widths, truth = _widths(components, alpha)
    return float(ndtr((difference - widths) / math.sqrt(truth)).mean()) if truth > 0 else float(difference > widths[0])


def detectable(components: Components, alpha: float) -> float:
    """Return the smallest true difference that is found with power `POWER`, or the half-width where nothing varied.

    At most 1, the largest difference that there can be.
    """
    if components.variance <= 0:
        return min(components.half_width(1 - alpha / 2), _MOST)
    widths, truth = _widths(components, alpha)
    low, high = 0.0, _MOST
    if ndtr((high - widths) / math.sqrt(truth)).mean() < POWER:
        return _MOST
    for _ in range(30):
        middle = (low + high) / 2
        if ndtr((middle - widths) / math.sqrt(truth)).mean() < POWER:
            low = middle
        else:
            high = middle
    return high


def _widths(components: Components, alpha: float) -> tuple[np.ndarray, float]:
    """Return drawn half-widths of studies with these components, and the true variance of their differences."""
    parts, truth = components.parts, components.variance
    if truth <= 0:
        return np.array([components.half_width(1 - alpha / 2)]), 0.0
    rng = np.random.default_rng(0)
    # Runs that vary by less than the noise of their answers are taken to vary by that noise.
    seed = parts.seed if parts.seed.sum() > parts.noise.sum() else parts.noise
    df = (parts.seeds - 1)[:, None]
    prompts = parts.prompts * np.ones(_DRAWS)
    if math.isfinite(parts.prompt_df):
        prompts = prompts * rng.chisquare(parts.prompt_df, _DRAWS) / parts.prompt_df
    drawn = Parts(
        seeds=parts.seeds,
        weights=parts.weights,
        seed=seed * rng.chisquare(df, (len(df), _DRAWS)) / df if len(df) else np.zeros((0, _DRAWS)),
        noise=np.repeat(parts.noise, _DRAWS, axis=1),
        prompts=prompts,
        prompt_df=parts.prompt_df,
    )
    widths = half_widths(drawn, 1 - alpha / 2)
    return np.where(total_variance(drawn) > 0, widths, _MOST), truth


def planned(components: Components, *, seeds: int, prompts: int) -> Components:
    """Return the expected components with other numbers of seeds per arm and of prompts, at equal variances."""
    factor = components.num_prompts / prompts if components.num_prompts else 1.0
    varies = components.seed_variance > components.noise
    arms = tuple(
        Arm(
            arm.weight,
            seeds,
            (max(arm.run_variance - arm.noise, 0.0) if varies else 0.0) + arm.noise * factor,
            arm.noise * factor,
        )
        for arm in components.arms
    )
    changed = replace(components, arms=arms, num_seeds=(seeds,) * len(components.num_seeds))
    if not components.num_prompts:
        return changed
    clusters = components.effective_clusters / factor
    return replace(
        changed,
        prompt_total=components.prompt_variance * factor + changed.noise,
        prompt_df=max(clusters - 1, min(components.prompt_df, 1.0)),
        num_prompts=prompts,
        num_clusters=max(round(components.num_clusters / factor), 2),
        effective_clusters=clusters,
    )


def needed(components: Components, target: float, alpha: float, *, most: int = 200) -> dict[str, int | None]:
    """Return the seeds per arm (at these prompts) and the prompts (at these seeds) that detect a difference `target`.

    Args:
        components: of the study as it is.
        target: the difference to detect with power `POWER`.
        alpha: error rate of the two-sided test.
        most: upper limit of the seeds per arm, and of the factor on the prompts.

    Returns:
        `{"seeds": n, "prompts": n}`; None where the other source of noise alone is too large, or beyond `most`.
    """
    seeds, prompts = min(components.num_seeds), components.num_prompts

    def finds(count: int, number: int) -> bool:
        return power(planned(components, seeds=count, prompts=number), target, alpha) >= POWER

    found: dict[str, int | None] = {"seeds": None, "prompts": None}
    if components.arms and components.seed_variance > 0:
        found["seeds"] = _least(lambda n: finds(n, prompts), max(seeds, 2), most)
    if prompts:
        steps = [math.ceil(prompts * 1.05**i) for i in range(int(math.log(most) / math.log(1.05)))]
        place = _least(lambda i: finds(seeds, steps[i]), 0, len(steps) - 1)
        found["prompts"] = None if place is None else steps[place]
    return found


def _least(is_enough: Callable[[int], bool], low: int, high: int) -> int | None:
    """Return the smallest number that is enough, by bisection; None where the largest is not."""
    if not is_enough(high):
        return None
    while low < high:
        middle = (low + high) // 2
        if is_enough(middle):
            high = middle
        else:
            low = middle + 1
    return low
