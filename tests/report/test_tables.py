"""The interval of one arm's mean: seeds and prompts, against scipy where only one of the two varies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats

from harness.decide.stats import contrast
from harness.report.study import read_study
from harness.report.tables import mean_interval
from harness.study.scores_csv import to_csv


def study(folder: Path, runs: dict[int, list[float]], clusters: list[str] | None = None):
    rows = [
        {"arm": "dpo", "config": "c", "seed": seed, "split": "golden", "prompt_id": f"p{number}", "scorer": "checks"}
        | {"score": score, "cluster": clusters[number] if clusters else ""}
        for seed, scores in runs.items()
        for number, score in enumerate(scores)
    ]
    (folder / "scores.csv").write_text(to_csv(pd.DataFrame(rows)))
    read = read_study(folder)
    return read, read.configs[0]


def test_with_one_seed_it_is_the_t_interval_over_prompts(tmp_path: Path) -> None:
    scores = [0.2, 0.4, 0.9, 0.5, 0.3]
    expected = scipy_stats.ttest_1samp(scores, 0).confidence_interval(0.95)
    assert mean_interval(*study(tmp_path, {1: scores}), "checks") == pytest.approx(tuple(expected))


def test_where_prompts_are_all_alike_it_is_the_t_interval_over_runs(tmp_path: Path) -> None:
    runs = {seed: [mean] * 6 for seed, mean in enumerate((0.5, 0.6, 0.55))}
    expected = scipy_stats.ttest_1samp([0.5, 0.6, 0.55], 0).confidence_interval(0.95)
    assert mean_interval(*study(tmp_path, runs), "checks") == pytest.approx(tuple(expected))


def test_it_covers_the_true_mean_about_as_often_as_it_says(tmp_path: Path) -> None:
    """Runs differ (SD 0.04), prompts differ: 1000 studies of 4 runs and 40 prompts; the true mean is 0.5.

    The Monte Carlo error of 95% is 0.7 points. The interval is the rule's own with one arm, as on the first study.
    """
    rng = np.random.default_rng(0)
    prompts = rng.normal(0.5, 0.1, (1000, 1, 40))
    runs = prompts + rng.normal(0, 0.04, (1000, 4, 1)) + rng.normal(0, 0.05, (1000, 4, 40))
    intervals = [contrast([scores], [1.0]).interval(0.95) for scores in runs]
    first = {seed: list(scores) for seed, scores in enumerate(runs[0])}
    assert mean_interval(*study(tmp_path, first), "checks") == pytest.approx(intervals[0])
    assert 0.93 <= np.mean([low <= 0.5 <= high for low, high in intervals]) <= 0.98


def test_prompts_of_a_cluster_count_as_one(tmp_path: Path) -> None:
    scores = [0.2, 0.2, 0.9, 0.9, 0.4, 0.4]
    alone = mean_interval(*study(tmp_path, {1: scores}), "checks")
    together = mean_interval(*study(tmp_path, {1: scores}, list("aabbcc")), "checks")
    assert together[1] - together[0] > alone[1] - alone[0]


def test_what_cannot_be_told_is_left_out(tmp_path: Path) -> None:
    assert mean_interval(*study(tmp_path, {1: [0.5]}), "checks") is None
    assert mean_interval(*study(tmp_path, {1: [0.5, 0.6]}, ["a", "a"]), "checks") is None
