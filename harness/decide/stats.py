"""The interval of a difference, on arrays (num_seeds, num_prompts): seeds unpaired, prompts paired; version 2.

Training seeds and golden prompts are both samples: a rule that counts only one of them finds winners where there are
none (15 to 50% of the time in simulations at a nominal 5%). numpy and scipy only; nothing is drawn at random.
`benchmarks/decision_rule.md` has the error rates, and what else was tried.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy.special import fdtr, stdtrit

# Values that differ by less than this share of the largest are equal: float32 and sums leave up to 1e-7 of it.
ROUNDING = 1e-6
# Two-sided p of the F test of two run variances below which the interval is at least Banerjee's bound: with up to three
# seeds in the arm that varies more. With S seeds it is this times (2 / (S - 1))^2: a larger sample is seldom small by
# chance. Chosen by simulation, like the next: the highest power at no more than 5.2% false winners.
DOUBTFUL = 0.5
# The noise of answers is in a run's mean and in the prompts' part. This share of it is taken off at the quantile of the
# seeds, the rest at that of the prompts; less of it with two seeds. Chosen by simulation: a share of 1 has 6.2% false
# winners (3 against 20 seeds, the 3 noisy), and a share of 0 finds differences of the size of the noise less often.
_NOISE_SHARE, _NOISE_SHARE_OF_TWO = 0.5, 0.25


class Interval(Protocol):
    """A difference with its interval."""

    @property
    def difference(self) -> float:
        """The difference."""
        ...

    def interval(self, confidence: float) -> tuple[float, float]:
        """Return the two-sided interval at a confidence such as 0.95."""
        ...


@dataclass(frozen=True)
class Arm:
    """The runs of one arm in a weighted sum of arms' means.

    Attributes:
        weight: of the arm's mean in the sum.
        seeds: number of runs.
        run_variance: variance over the seeds of one run's mean score.
        noise: the part of it that is noise of single answers.
    """

    weight: float
    seeds: int
    run_variance: float
    noise: float


@dataclass(frozen=True)
class Parts:
    """The parts of a variance, of N studies at once: shape (num_arms, N) or (N,).

    Arms whose runs do not count are absent.

    Attributes:
        seeds, weights: of each arm, shape (num_arms,).
        seed: V_a, variance of the sum due to the arm's seeds, its answers' noise included.
        noise: the part of it that is noise of answers.
        prompts: c, variance over prompts of the sum of the arms' means, the noise of answers included.
        prompt_df: degrees of freedom of c; inf without prompts.
    """

    seeds: np.ndarray
    weights: np.ndarray
    seed: np.ndarray
    noise: np.ndarray
    prompts: np.ndarray
    prompt_df: float


def half_widths(parts: Parts, level: float) -> np.ndarray:
    """Return the half-widths of the intervals whose ends are at the quantile `level`; zero where nothing varied.

    Satterthwaite's t, and at least Banerjee's bound where the arms have other numbers of seeds or other variances.
    """
    if not len(parts.seeds):
        return np.asarray(_t(level, parts.prompt_df) * np.sqrt(parts.prompts))
    squares = _satterthwaite(parts, level)
    return np.sqrt(np.where(_is_doubtful(parts), np.maximum(squares, _banerjee(parts, level)), squares))


def total_variance(parts: Parts) -> np.ndarray:
    """Return V = c + max(A - noise, 0), A the sum of the arms' V_a: never below c, which holds the noise as well."""
    excess = np.maximum(parts.seed.sum(0) - parts.noise.sum(0), 0.0)
    return np.asarray(parts.prompts + excess)


def _satterthwaite(parts: Parts, level: float) -> np.ndarray:
    """Return squared half-widths by t with Satterthwaite's degrees of freedom (1946) over seeds and prompts.

    Over the arms' seeds they are Welch's (1947). The seeds' share of V counts with the noise that they hold, also where
    they vary no more than that noise: they may do so by chance.
    """
    seed, total = parts.seed.sum(0), total_variance(parts)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(seed > 0, np.minimum(seed / total, 1.0), 0.0)
        inverse = (parts.seed**2 / (parts.seeds - 1)[:, None]).sum(0) / seed**2
        spread = np.where(share > 0, share**2 * inverse, 0.0) + (1 - share) ** 2 / parts.prompt_df
        return np.asarray(_t(level, 1 / spread) ** 2 * total)


def _banerjee(parts: Parts, level: float) -> np.ndarray:
    """Return squared half-widths by Banerjee's bound (1960): each part of V with the squared t quantile of its own.

    It holds for every ratio of the variances, where Welch's approximation finds up to 7.5% false winners: one of two
    small samples has nearly all of the variance, and is small by chance.
    """
    prompts = _t(level, parts.prompt_df) ** 2
    seeds = _t(level, parts.seeds - 1) ** 2
    share = np.where(parts.seeds > 2, _NOISE_SHARE, _NOISE_SHARE_OF_TWO)
    off = share * seeds + (1 - share) * prompts
    own = np.maximum(seeds[:, None] * parts.seed - off[:, None] * parts.noise, 0.0).sum(0)
    return np.asarray(prompts * parts.prompts + own)


def _is_doubtful(parts: Parts) -> np.ndarray:
    """Return where the arms' run variances may not be taken for equal, or one arm alone has runs that count.

    Of arms with unequal numbers of seeds they never are where the smaller one varies more, or has only two. Where the
    runs vary no more than the noise of their answers, there is no seed variance to doubt, unless two seeds are to tell.
    """
    varies = (parts.seed.sum(0) > parts.noise.sum(0)) | (parts.seeds.min() == 2)
    if len(parts.seeds) == 1:
        return np.asarray(varies)
    runs = parts.seed * (parts.seeds / parts.weights**2)[:, None]
    high, low = runs.argmax(0), runs.argmin(0)
    every = np.arange(parts.seed.shape[1])
    limit = DOUBTFUL * np.minimum((2 / (parts.seeds[high] - 1)) ** 2, 1)
    unequal = variance_test(runs[high, every], parts.seeds[high], runs[low, every], parts.seeds[low]) < limit
    is_lopsided = parts.seeds.min() == 2 < parts.seeds.max()
    return np.asarray(varies & (unequal | (parts.seeds[high] < parts.seeds[low]) | is_lopsided))


def variance_test(high: np.ndarray, seeds_high: np.ndarray, low: np.ndarray, seeds_low: np.ndarray) -> np.ndarray:
    """Return the two-sided p value of the F test that two samples have one variance; 1 where neither varied."""
    with np.errstate(divide="ignore", invalid="ignore"):
        below = fdtr(seeds_high - 1, seeds_low - 1, np.where(high > 0, high / low, 1.0))
    return np.where(high > 0, np.minimum(2 * np.minimum(below, 1 - below), 1.0), 1.0)


def _t(level: float, df: float | np.ndarray) -> np.ndarray:
    return np.asarray(stdtrit(np.minimum(df, 1e9), level))


@dataclass(frozen=True)
class Components:
    """A difference between arms with its variance by source.

    Attributes:
        difference: mean of arm A minus mean of arm B, or another weighted sum of arms' means.
        arms: the arms whose runs count as a sample; none at checkpoint level.
        prompt_total: c, variance over prompts of the difference of the arms' means, noise of the answers included.
        prompt_df: effective number of clusters minus one; inf without prompts.
        num_seeds: number of seeds per arm.
        num_prompts: golden prompts; 0 where a run has one score.
        num_clusters: clusters of prompts.
        effective_clusters: (sum n)^2 / sum n^2 over the clusters' sizes n; the number of clusters where they are equal.
    """

    difference: float
    arms: tuple[Arm, ...]
    prompt_total: float
    prompt_df: float
    num_seeds: tuple[int, ...]
    num_prompts: int
    num_clusters: int
    effective_clusters: float

    @property
    def parts(self) -> Parts:
        """The parts of the variance, with N = 1."""
        arms = self.arms
        factors = [arm.weight**2 / arm.seeds for arm in arms]
        return Parts(
            seeds=np.array([arm.seeds for arm in arms]),
            weights=np.array([arm.weight for arm in arms]),
            seed=np.array([[f * arm.run_variance] for f, arm in zip(factors, arms, strict=True)]).reshape(-1, 1),
            noise=np.array([[f * arm.noise] for f, arm in zip(factors, arms, strict=True)]).reshape(-1, 1),
            prompts=np.array([self.prompt_total]),
            prompt_df=self.prompt_df,
        )

    @property
    def seed_variance(self) -> float:
        """A, variance of the difference due to seeds, the noise of their answers included."""
        return float(sum(arm.weight**2 * arm.run_variance / arm.seeds for arm in self.arms))

    @property
    def noise(self) -> float:
        """The part of the seeds' variance that is noise of single answers; `prompt_total` holds it, too."""
        return float(sum(arm.weight**2 * arm.noise / arm.seeds for arm in self.arms))

    @property
    def seed_df(self) -> float:
        """Degrees of freedom of `seed_variance` (Welch 1947); inf where no seed varies."""
        squares = [
            (arm.weight**2 * arm.run_variance / arm.seeds) ** 2 / (arm.seeds - 1) for arm in self.arms if arm.seeds > 1
        ]
        return self.seed_variance**2 / sum(squares) if sum(squares) > 0 else math.inf

    @property
    def prompt_variance(self) -> float:
        """Variance of the difference due to prompts, without the noise of the runs."""
        return max(self.prompt_total - self.noise, 0.0)

    @property
    def variance(self) -> float:
        """V, the variance of the difference."""
        return float(total_variance(self.parts)[0])

    def half_width(self, level: float) -> float:
        """Return the half-width for a quantile, or, where nothing varied, a bound on unseen deviations.

        C clusters without one deviation leave a share of up to 1 - (1 - level)**(1/C) of the population unseen (the
        exact form of the rule of three), and a difference in [-1, 1] can deviate from D by at most 1 + |D|. Without
        prompts nothing bounds it.
        """
        if self.variance > 0:
            return float(half_widths(self.parts, level)[0])
        share = 1 - (1 - level) ** (1 / self.effective_clusters) if self.num_clusters else 1.0
        return share * (1 + abs(self.difference))

    def interval(self, confidence: float) -> tuple[float, float]:
        """Return the two-sided interval of the difference at a confidence such as 0.95."""
        half = self.half_width((1 + confidence) / 2)
        return self.difference - half, self.difference + half

    def detectable(self, alpha: float, power: float = 0.8) -> float:
        """Return the minimum detectable difference at these estimates: half-width plus that of the quantile `power`.

        A true difference of this size is found with about this power by an interval as wide as this one; at most 1. Of
        a study that is not made yet, whose width is not known, `harness.decide.planning` says what it finds.
        """
        half = self.half_width(1 - alpha / 2)
        return min(half + self.half_width(power) if self.variance > 0 else half, 1.0)

    def lower_bound(self, alpha: float) -> float:
        """Return the one-sided lower bound of the difference, for non-inferiority."""
        return self.difference - self.half_width(1 - alpha)


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


def against_base(scores: np.ndarray, base: np.ndarray, clusters: np.ndarray | None = None) -> Components:
    """Estimate an arm's difference to one model that is given and not trained by the arms: its run is no sample.

    Args:
        scores: shape (num_seeds, num_prompts).
        base: shape (1, num_prompts), or more runs, whose mean counts.
        clusters: as in `compare`.

    Raises:
        ValueError: as in `compare`.
    """
    return contrast([scores, base], [1.0, -1.0], clusters, given=(1,))


def contrast(
    arms: Sequence[np.ndarray],
    weights: Sequence[float],
    clusters: np.ndarray | None = None,
    *,
    given: Sequence[int] = (),
) -> Components:
    """Estimate the components of a weighted sum of arms' means on the same prompts; `compare` is (1, -1).

    Each arm's seed variance and run noise counts with its weight squared, since seeds are not paired; the prompts'
    variance is that of the weighted sum over arms at each prompt, since prompts are.

    Args:
        arms: arrays of shape (num_seeds, num_prompts), the prompts in the same order.
        weights: one for each arm; they sum to zero for a difference, and a single 1 gives an arm's own mean.
        clusters: as in `compare`.
        given: places of arms whose runs are no sample.

    Raises:
        ValueError: for arrays of another shape, or fewer than two prompts or clusters.
    """
    shapes = [scores.shape for scores in arms]
    if any(len(shape) != 2 or shape[1] != shapes[0][1] for shape in shapes):
        raise ValueError(f"expected (seeds, prompts) over the same prompts, got {' and '.join(map(str, shapes))}")
    scale = max(float(np.abs(scores).max(initial=0.0)) for scores in arms)
    by_prompt = sum(weight * scores.mean(0) for weight, scores in zip(weights, arms, strict=True))
    variance, effective = mean_variance(np.asarray(by_prompt), clusters, scale=scale)
    sampled = [place for place in range(len(arms)) if place not in given]
    several = all(shapes[place][0] > 1 for place in sampled)
    return Components(
        difference=float(sum(weight * scores.mean() for weight, scores in zip(weights, arms, strict=True))),
        arms=tuple(_arm(arms[place], weights[place], scale) for place in sampled) if several else (),
        prompt_total=variance,
        prompt_df=effective - 1,
        num_seeds=tuple(shape[0] for shape in shapes),
        num_prompts=shapes[0][1],
        num_clusters=shapes[0][1] if clusters is None else len(np.unique(clusters)),
        effective_clusters=effective,
    )


def _arm(scores: np.ndarray, weight: float, scale: float) -> Arm:
    noise = residual_mean_square(scores)
    noise = 0.0 if noise <= (ROUNDING * scale) ** 2 else noise
    return Arm(weight, len(scores), _spread(scores.mean(1), scale), noise / scores.shape[1])


def compare_runs(means_a: np.ndarray, means_b: np.ndarray, num_prompts: int | None = None) -> Components:
    """Estimate the components where each run has one score: Welch's test over seeds, with Banerjee's bound.

    With one run in an arm nothing is known of its noise, and without `num_prompts` the interval holds every difference.

    Args:
        means_a: shape (num_seeds_a,).
        means_b: shape (num_seeds_b,).
        num_prompts: prompts behind each score. Their sampling then counts with at most p (1 - p) / n an arm, the
            variance of a share of n prompts that the arms do not share; the mean of scores in [0, 1] varies less.

    Raises:
        ValueError: fewer than two prompts.
    """
    if num_prompts is not None and num_prompts < 2:
        raise ValueError(f"expected at least 2 prompts behind a score, got {num_prompts}")
    means = (np.asarray(means_a, float), np.asarray(means_b, float))
    scale = max(float(np.abs(values).max()) for values in means)
    several = min(map(len, means)) > 1
    arms = (Arm(w, len(values), _spread(values, scale), 0.0) for values, w in zip(means, (1.0, -1.0), strict=True))
    count = num_prompts or 0
    rates = [float(np.clip(values.mean(), 0, 1)) for values in means]
    return Components(
        difference=float(means[0].mean() - means[1].mean()),
        arms=tuple(arms) if several else (),
        prompt_total=sum(rate * (1 - rate) for rate in rates) / count if count else 0.0,
        prompt_df=count - 1 if count else math.inf,
        num_seeds=(len(means[0]), len(means[1])),
        num_prompts=count,
        num_clusters=count,
        effective_clusters=float(count),
    )


def _spread(values: np.ndarray, scale: float) -> float:
    """Return the sample variance, or zero where the values differ by rounding alone; `scale` is the largest score."""
    found = float(values.var(ddof=1)) if len(values) > 1 else 0.0
    return 0.0 if found <= (ROUNDING * scale) ** 2 else found


def mean_variance(
    values: np.ndarray, clusters: np.ndarray | None = None, *, scale: float | None = None
) -> tuple[float, float]:
    """Return the variance of the mean of values that come in clusters, and the effective number of clusters.

    CR2 (Bell & McCaffrey 2002) for a mean: the square of each cluster's summed deviations over 1 - n/N, n its size and
    N all values. With clusters of one size this is the sample variance of the clusters' means over their number
    (Miller 2024, arXiv 2411.00640, with C/(C-1)). The effective number is (sum n)^2 / sum n^2: a t with that number
    less one keeps 5% where one cluster has most of the prompts; with the number itself it does not.

    Args:
        values: shape (num_values,).
        clusters: labels; None makes each value a cluster.
        scale: the largest of the scores behind the values, for rounding; None for the largest value.

    Raises:
        ValueError: fewer than two values or clusters.
    """
    labels = np.arange(len(values)) if clusters is None else np.unique(clusters, return_inverse=True)[1]
    sizes = np.bincount(labels)
    if len(sizes) < 2:
        raise ValueError(
            f"expected at least 2 prompts in different clusters, got {len(values)} prompts in {len(sizes)}"
        )
    effective = float(sizes.sum() ** 2 / (sizes**2).sum())
    if not _spread(values, float(np.abs(values).max()) if scale is None else scale):
        return 0.0, effective
    sums = np.bincount(labels, weights=values - values.mean())
    return float((sums**2 / (1 - sizes / len(values))).sum()) / len(values) ** 2, effective


def residual_mean_square(scores: np.ndarray) -> float:
    """Return the residual mean square of the two-way layout of shape (num_seeds, num_prompts): noise of one score."""
    num_seeds, num_prompts = scores.shape
    residual = scores - scores.mean(1, keepdims=True) - scores.mean(0, keepdims=True) + scores.mean()
    return float((residual**2).sum()) / ((num_seeds - 1) * (num_prompts - 1))
