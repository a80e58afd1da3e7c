"""The interval of a difference and its tests, on arrays (num_seeds, num_prompts): seeds unpaired, prompts paired.

Training seeds and golden prompts are both samples: a rule that counts only one of them finds winners where there are
none (15 to 50% of the time in simulations at a nominal 5%). numpy and scipy only; nothing is drawn at random.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import ndtri, stdtrit

POWER = 0.8


@dataclass(frozen=True)
class Components:
    """A difference between arms with its variance by source, in the notation of DESIGN, section 5.

    Attributes:
        difference: mean of arm A minus mean of arm B.
        seed_variance: A = a_A + a_B, variance of the difference due to seeds.
        seed_df: its degrees of freedom (Welch-Satterthwaite); inf where no seed varies.
        prompt_variance: c, variance of the difference due to prompts, without the noise of the runs.
        prompt_df: clusters minus one; inf without prompts.
        num_seeds: number of seeds per arm.
        num_prompts: golden prompts; 0 where a run has one score.
        num_clusters: clusters of prompts.
    """

    difference: float
    seed_variance: float
    seed_df: float
    prompt_variance: float
    prompt_df: float
    num_seeds: tuple[int, ...]
    num_prompts: int
    num_clusters: int

    @property
    def variance(self) -> float:
        """V, the variance of the difference."""
        return self.seed_variance + self.prompt_variance

    def quantile(self, level: float) -> float:
        """Return t*(level), the two parts' t quantiles weighted by their variances (Cochran's approximation)."""
        if self.variance <= 0:
            return 0.0
        parts = ((self.seed_variance, self.seed_df), (self.prompt_variance, self.prompt_df))
        return sum(weight * _t(level, df) for weight, df in parts if weight > 0) / self.variance

    def half_width(self, level: float) -> float:
        """Return t*(level) * sqrt(V), or, where nothing varied, a bound on unseen deviations.

        C clusters without one deviation leave a share of up to 1 - (1 - level)**(1/C) of the population unseen (the
        exact form of the rule of three), and a difference in [-1, 1] can deviate from D by at most 1 + |D|. Without
        prompts nothing bounds it.
        """
        if self.variance > 0:
            return self.quantile(level) * math.sqrt(self.variance)
        share = 1 - (1 - level) ** (1 / self.num_clusters) if self.num_clusters else 1.0
        return share * (1 + abs(self.difference))

    def interval(self, confidence: float) -> tuple[float, float]:
        """Return the two-sided interval of the difference at a confidence such as 0.95."""
        half = self.half_width((1 + confidence) / 2)
        return self.difference - half, self.difference + half

    def lower_bound(self, alpha: float) -> float:
        """Return the one-sided lower bound of the difference, for non-inferiority."""
        return self.difference - self.half_width(1 - alpha)

    def detectable(self, alpha: float, power: float = POWER) -> float:
        """Return the minimum detectable difference: (t*(1 - alpha/2) + t*(power)) * sqrt(V).

        A true difference of this size makes the two-sided test at `alpha` find a winner with about this power. Where
        nothing varied it is the half-width of the interval.
        """
        if self.variance <= 0:
            return self.half_width(1 - alpha / 2)
        return (self.quantile(1 - alpha / 2) + self.quantile(power)) * math.sqrt(self.variance)


def _t(level: float, df: float) -> float:
    return float(ndtri(level) if math.isinf(df) else stdtrit(df, level))


def compare(scores_a: np.ndarray, scores_b: np.ndarray, clusters: np.ndarray | None = None) -> Components:
    """Estimate the components of the difference of two arms on the same prompts.

    With one seed in either arm only the prompts count: the result is about two checkpoints, not about methods.

    Args:
        scores_a: shape (num_seeds_a, num_prompts).
        scores_b: shape (num_seeds_b, num_prompts), the prompts in the same order.
        clusters: shape (num_prompts,), labels; None makes each prompt a cluster.

    Raises:
        ValueError: for arrays of another shape, or fewer than two prompts or clusters.
    """
    return contrast([scores_a, scores_b], [1.0, -1.0], clusters)


def contrast(arms: Sequence[np.ndarray], weights: Sequence[float], clusters: np.ndarray | None = None) -> Components:
    """Estimate the components of a weighted sum of arms' means on the same prompts; `compare` is (1, -1).

    Each arm's seed variance and run noise counts with its weight squared, since seeds are not paired; the prompts'
    variance is that of the weighted sum over arms at each prompt, since prompts are.

    Args:
        arms: arrays of shape (num_seeds, num_prompts), the prompts in the same order.
        weights: one for each arm; they sum to zero for a difference, and a single 1 gives an arm's own mean.
        clusters: as in `compare`.

    Raises:
        ValueError: for arrays of another shape, or fewer than two prompts or clusters.
    """
    shapes = [scores.shape for scores in arms]
    if any(len(shape) != 2 or shape[1] != shapes[0][1] for shape in shapes):
        raise ValueError(f"expected (seeds, prompts) over the same prompts, got {' and '.join(map(str, shapes))}")
    by_prompt = sum(weight * scores.mean(0) for weight, scores in zip(weights, arms, strict=True))
    variance, num_clusters = mean_variance(np.asarray(by_prompt), clusters)
    whole = Components(
        difference=float(sum(weight * scores.mean() for weight, scores in zip(weights, arms, strict=True))),
        seed_variance=0.0,
        seed_df=math.inf,
        prompt_variance=variance,
        prompt_df=num_clusters - 1,
        num_seeds=tuple(shape[0] for shape in shapes),
        num_prompts=shapes[0][1],
        num_clusters=num_clusters,
    )
    if min(whole.num_seeds) < 2:
        return whole
    seed_variance, seed_df = _welch([scores.mean(1) for scores in arms], weights)
    noise = sum(w**2 * (residual_mean_square(scores) / scores.size) for scores, w in zip(arms, weights, strict=True))
    return replace(whole, seed_variance=seed_variance, seed_df=seed_df, prompt_variance=max(variance - noise, 0.0))


def compare_runs(means_a: np.ndarray, means_b: np.ndarray) -> Components:
    """Estimate the components where each run has one score: Welch's test over seeds.

    Args:
        means_a: shape (num_seeds_a,).
        means_b: shape (num_seeds_b,).

    Raises:
        ValueError: fewer than two runs in an arm, so that their noise cannot be estimated.
    """
    if min(len(means_a), len(means_b)) < 2:
        raise ValueError("one score per run needs at least two runs per arm")
    variance, df = _welch([means_a, means_b], [1.0, -1.0])
    difference = float(means_a.mean() - means_b.mean())
    return Components(difference, variance, df, 0.0, math.inf, (len(means_a), len(means_b)), 0, 0)


def mean_variance(values: np.ndarray, clusters: np.ndarray | None = None) -> tuple[float, int]:
    """Return the variance of the mean of values that come in clusters, and the number of clusters.

    The square of each cluster's summed deviations, summed, times C/(C-1) over P squared; with clusters of one this is
    the sample variance over P (Miller 2024, arXiv 2411.00640, clustered standard errors; C/(C-1) as in its follow-ups).
    """
    labels = np.arange(len(values)) if clusters is None else np.unique(clusters, return_inverse=True)[1]
    sums = np.bincount(labels, weights=values - values.mean())
    count = len(sums)
    if count < 2:
        raise ValueError(f"expected at least 2 prompts in different clusters, got {len(values)} prompts in {count}")
    return float((sums**2).sum() * count / (count - 1) / len(values) ** 2), count


def _welch(means: Sequence[np.ndarray], weights: Sequence[float]) -> tuple[float, float]:
    """Return the variance of a weighted sum of means and its Welch-Satterthwaite degrees of freedom."""
    parts = [w**2 * float(values.var(ddof=1)) / len(values) for values, w in zip(means, weights, strict=True)]
    total = sum(parts)
    if total <= 0:
        return 0.0, math.inf
    spread = sum(part**2 / (len(values) - 1) for part, values in zip(parts, means, strict=True))
    return total, total**2 / spread


def residual_mean_square(scores: np.ndarray) -> float:
    """Return the residual mean square of the two-way layout of shape (num_seeds, num_prompts): noise of one score."""
    num_seeds, num_prompts = scores.shape
    residual = scores - scores.mean(1, keepdims=True) - scores.mean(0, keepdims=True) + scores.mean()
    return float((residual**2).sum()) / ((num_seeds - 1) * (num_prompts - 1))


def planned(components: Components, *, seeds: int, prompts: int) -> Components:
    """Return the expected components with other numbers of seeds per arm and of prompts, at equal variances."""
    seed_factor = sum(components.num_seeds) / len(components.num_seeds) / seeds
    prompt_factor = components.num_prompts / prompts if components.num_prompts else 1.0
    ratio = components.num_clusters / components.num_prompts if components.num_prompts else 1.0
    return replace(
        components,
        seed_variance=components.seed_variance * seed_factor,
        seed_df=components.seed_df * (seeds - 1) / max(sum(components.num_seeds) / len(components.num_seeds) - 1, 1.0),
        prompt_variance=components.prompt_variance * prompt_factor,
        prompt_df=max(prompts * ratio - 1, 1.0) if components.num_prompts else math.inf,
        num_seeds=(seeds, seeds),
        num_prompts=prompts if components.num_prompts else 0,
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
    by_seeds = (n for n in range(max(seeds, 2), most + 1))
    found_seeds = next(
        (n for n in by_seeds if planned(components, seeds=n, prompts=prompts).detectable(alpha) <= target), None
    )
    found_prompts = None
    if prompts:
        steps = (math.ceil(prompts * 1.05**i) for i in range(int(math.log(most) / math.log(1.05))))
        found_prompts = next(
            (n for n in steps if planned(components, seeds=seeds, prompts=n).detectable(alpha) <= target), None
        )
    return {"seeds": found_seeds if components.seed_variance > 0 else None, "prompts": found_prompts}
