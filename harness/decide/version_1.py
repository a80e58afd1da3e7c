"""Version 1 of the decision rule: the interval of studies that were registered before version 2, for one warning.

V = A + max(c - noise, 0), with the t quantiles of seeds and prompts weighted by their variances (Cochran).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from harness.decide.deciding import decide_interval
from harness.decide.rule import basis
from harness.decide.stats import Components, compare
from harness.decide.words import confidence
from harness.study.registration import RULE_VERSION, Guard


@dataclass(frozen=True)
class Version1:
    """A difference with its interval by version 1.

    Attributes:
        difference: mean of arm A minus mean of arm B.
        seed_variance: A, with `seed_df` degrees of freedom (Welch).
        prompt_variance: c without the noise of the runs, with `prompt_df`, the number of clusters less one.
    """

    difference: float
    seed_variance: float
    seed_df: float
    prompt_variance: float
    prompt_df: float

    def interval(self, confidence: float) -> tuple[float, float]:
        """Return the two-sided interval of the difference at a confidence such as 0.95."""
        level, variance = (1 + confidence) / 2, self.seed_variance + self.prompt_variance
        if variance <= 0:
            share = 1 - (1 - level) ** (1 / (self.prompt_df + 1)) if math.isfinite(self.prompt_df) else 1.0
            half = share * (1 + abs(self.difference))
        else:
            parts = ((self.seed_variance, self.seed_df), (self.prompt_variance, self.prompt_df))
            quantile = sum(part * float(stdtrit(min(df, 1e9), level)) for part, df in parts if part > 0) / variance
            half = quantile * math.sqrt(variance)
        return self.difference - half, self.difference + half


def version_1(found: Components, by_prompt: np.ndarray | None = None, clusters: np.ndarray | None = None) -> Version1:
    """Return version 1's reading of the same scores.

    Args:
        found: the components by version 2.
        by_prompt: the difference of the arms' means at each prompt; None where a run has one score.
        clusters: label of each prompt; None makes each prompt a cluster.
    """
    if by_prompt is None:
        return Version1(found.difference, found.seed_variance, found.seed_df, 0.0, math.inf)
    labels = np.arange(len(by_prompt)) if clusters is None else np.unique(clusters, return_inverse=True)[1]
    sums = np.bincount(labels, weights=by_prompt - by_prompt.mean())
    total = float((sums**2).sum()) * len(sums) / (len(sums) - 1) / len(by_prompt) ** 2
    prompts = max(total - found.noise, 0.0)
    return Version1(found.difference, found.seed_variance, found.seed_df, prompts, len(sums) - 1)


def compare_version_1(scores_a: np.ndarray, scores_b: np.ndarray, clusters: np.ndarray | None = None) -> Version1:
    """Return version 1's interval of two arms, arguments as for `harness.decide.stats.compare`."""
    return version_1(compare(scores_a, scores_b, clusters), scores_a.mean(0) - scores_b.mean(0), clusters)


def version_1_warning(
    scores: pd.DataFrame, *, metric: str, margin: float, alpha: float, arms: tuple[str, str], guards: Sequence[Guard]
) -> str:
    """Return the warning of a study that was registered before version 2: that version 2 decides, and what 1 says.

    Arguments as for `verdict`.
    """
    word, ends = by_version_1(scores, metric=metric, margin=margin, alpha=alpha, arms=arms)
    narrowed = " (guards not counted)" if guards and word in arms else ""
    return (
        f"this study was registered before version {RULE_VERSION} of the decision rule, which decides it; version 1 "
        f"says {word}{narrowed}, {confidence(alpha)} interval {100 * ends[0]:+.1f} to {100 * ends[1]:+.1f} points"
    )


def by_version_1(
    scores: pd.DataFrame, *, metric: str, margin: float, alpha: float, arms: tuple[str, str]
) -> tuple[str, tuple[float, float]]:
    """Return version 1's verdict, guards not counted, and its interval at 1 - alpha; arguments as for `verdict`."""
    on = basis(scores, metric=metric, arms=arms, others=())
    first, second = on.kept.values()
    by_prompt = first.values.mean(0) - second.values.mean(0) if first.prompts else None
    found = version_1(on.found, by_prompt, first.clusters if first.prompts else None)
    return decide_interval(found, arms=arms, margin=margin, alpha=alpha)[0], found.interval(1 - alpha)
