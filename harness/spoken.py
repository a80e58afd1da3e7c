"""The figures in words, with their numbers: for those who do not see them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from harness.palette import title
from harness.study import Config, Study
from harness.untrusted import visible
from harness.wording import interval, levels, listing, number, percent, plural, points


def config_name(study: Study, config: Config) -> str:
    """Name a config in prose, on one line: the arm, and what tells it from the arm's other configs."""
    suffix = visible(study.label(config).removeprefix(config.arm))
    return title(config.arm) + (f"{suffix[:40]}…" if len(suffix) > 40 else suffix)


def say_difference(study: Study) -> str:
    """Say the difference, its intervals and the margin; nothing where there is no verdict."""
    difference = number(study.verdict.get("difference"))
    if difference is None or len(study.arms) < 2:
        return ""
    first, second = study.arms[:2]
    said = f"{title(first)} minus {title(second)}: {points(difference)} points"
    for level, name in zip(("ci95", "ci90"), levels(study), strict=True):
        said += f", {name} interval {interval(study.verdict.get(level))}"
    return f"{said}; margin {points(study.verdict.get('margin'), signed=False)}. "


def say_runs(study: Study, runs: Sequence[tuple[Config, pd.Series]]) -> str:
    """Say each config's mean and the means of its runs."""
    return " ".join(
        f"{config_name(study, config)}: mean {percent(means.mean())}, runs {listing(map(percent, means))}."
        for config, means in runs
    )


def say_learning(arm: str, curves: Mapping[str, pd.Series], num_runs: int) -> str:
    """Say where each curve begins and ends; the mean over runs, by step."""
    said = f"{title(arm)}, {plural(num_runs, 'run')}."
    for label, curve in curves.items():
        mean = curve.dropna()
        said += (
            f" {label}: {mean.iloc[0]:.3g} at step {mean.index[0]:g}, {mean.iloc[-1]:.3g} at step {mean.index[-1]:g}."
        )
    return said


def say_lengths(study: Study, lengths: Sequence[tuple[Config, np.ndarray]]) -> str:
    """Say mean, median and range of each config's lengths, in tokens."""
    return " ".join(
        f"{config_name(study, config)}: mean {tokens.mean():.1f}, median {np.median(tokens):.0f}, "
        f"from {tokens.min():.0f} to {tokens.max():.0f} tokens."
        for config, tokens in lengths
    )
