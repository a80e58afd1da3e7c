"""Differences by prompt and scores by length: against pandas by hand, and through the report."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from harness.report.page import render_report
from harness.report.prompts import draw_length_scores, draw_prompts, moved_table, prompt_differences
from harness.report.study import read_study
from harness.report.style import looks
from tests.study_fixture import build_study


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_study(tmp_path_factory.mktemp("prompts") / "letters", prompts=80)


def by_hand(folder: Path) -> pd.Series:
    scores = pd.read_csv(folder / "scores.csv")
    rows = scores[(scores["split"] == "golden") & (scores["scorer"] == "checks")]
    table = rows[rows["arm"] != "sft"].groupby(["arm", "prompt_id"])["score"].mean().unstack(0)
    return table["simpo"] - table["dpo"]


def test_differences_are_those_of_the_seed_averages_the_largest_first(folder: Path) -> None:
    found = prompt_differences(read_study(folder))
    wanted = by_hand(folder)
    assert found.to_dict() == pytest.approx(wanted.to_dict())
    assert found.is_monotonic_decreasing
    assert found.mean() == pytest.approx(wanted.mean())


def test_the_figure_says_how_many_moved_each_way(folder: Path) -> None:
    study, wanted = read_study(folder), by_hand(folder)
    drawing = draw_prompts(study, looks(study.arms))
    assert drawing is not None
    ahead, behind = int((wanted > 0).sum()), int((wanted < 0).sum())
    assert f"SimPO scores higher on {ahead} of 80 prompts, DPO on {behind}" in drawing.alt_text
    assert drawing == draw_prompts(read_study(folder), looks(study.arms))


def test_the_prompts_that_moved_most_are_listed_each_way(folder: Path) -> None:
    table = moved_table(read_study(folder))
    wanted = by_hand(folder)
    assert table is not None
    assert len(table.frame) == 10
    assert list(table.frame.columns) == ["Prompt", "simpo", "dpo", "Difference"]
    assert wanted[table.frame.index[0]] == wanted.max()
    assert wanted[table.frame.index[5]] == wanted.min()
    assert all(text.startswith("Sort the letters") for text in table.frame["Prompt"])


def test_scores_by_length_are_means_of_answers_of_like_length(folder: Path) -> None:
    study = read_study(folder)
    drawing = draw_length_scores(study, looks(study.arms))
    assert drawing is not None
    rows = study.confirmed
    mine = rows[(rows["arm"] == "simpo") & (rows["scorer"] == "checks")]
    bins = pd.qcut(mine["tokens"], 8, labels=False, duplicates="drop")
    first = mine[bins == bins.min()]
    assert f"SimPO: {100 * first['score'].mean():.1f}% at {first['tokens'].mean():.1f} tokens" in drawing.alt_text


def test_both_stand_in_the_report_and_one_arm_alone_has_neither_difference(folder: Path, tmp_path: Path) -> None:
    page = render_report(folder).read_text(encoding="utf-8")
    assert 'id="figure-prompts"' in page
    assert 'id="figure-length-scores"' in page
    assert "SimPO</span>SimPO" not in page
    alone = build_study(tmp_path / "alone", prompts=10)
    for path in alone.glob("trials/*/manifest.json"):
        if '"dpo"' in path.read_text():
            path.unlink()
    scores = pd.read_csv(alone / "scores.csv")
    scores[scores["arm"] != "dpo"].to_csv(alone / "scores.csv", index=False)
    (alone / "verdict.json").unlink()
    page = render_report(alone).read_text(encoding="utf-8")
    assert 'id="figure-prompts"' not in page
