"""A command that leaves out what its study has registered; an expected verdict; how often a guard passes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from harness.study.decision import read_looks
from harness.study.errors import UsageError
from harness.study.files import read_json
from harness.sweep.app import print_result, run_sweep
from harness.sweep.protocol import StudyResult
from tests.conftest import SMALL, overriding

pytestmark = pytest.mark.slow

RULE = ["decide.metric=checks_fraction", "decide.margin=0.1", "decide.guards=[{metric: checks, margin: 0.3}]"]


def sweep(results: Path, *arguments: str) -> StudyResult:
    (result,) = run_sweep(overriding(SMALL, f"results_dir={results}", "study=small", *arguments))
    return result


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A finished study with one seed and a rule of its own; tests work on copies."""
    results = tmp_path_factory.mktemp("remembered") / "results"
    sweep(results, "+method=simpo,dpo", "seed=3", *RULE)
    return results / "small"


@pytest.fixture
def results(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "results" / "small")
    return tmp_path / "results"


@pytest.mark.parametrize("arms", ["simpo,dpo", "dpo,simpo", "dpo"])
def test_what_is_left_out_is_what_was_registered(arms: str, results: Path) -> None:
    """The defaults would train ten more trials, look at golden again, and ask another question."""
    registered = (results / "small" / "study.yaml").read_text()
    result = sweep(results, f"+method={arms}")
    assert result.launched == 0
    assert (results / "small" / "study.yaml").read_text() == registered
    assert len(read_looks(results / "small")) == 1
    assert result.verdict is not None
    assert (result.verdict["metric"], result.verdict["margin"]) == ("checks_fraction", 0.1)
    assert result.verdict["guards"][0]["metric"] == "checks"


def test_a_new_arm_gets_the_registered_seeds(results: Path) -> None:
    result = sweep(results, "+method=simpo,dpo,dpo_norm")
    assert result.launched == 1
    assert result.verdict is not None
    assert result.verdict["pairs"][0]["arms"] == ["simpo", "dpo"]
    assert len(result.verdict["pairs"]) == 3


def test_seeds_that_are_given_are_added(results: Path) -> None:
    assert sweep(results, "+method=simpo,dpo", "seed=3,4").launched == 2


def test_another_rule_is_still_refused(results: Path) -> None:
    with pytest.raises(UsageError, match="registered with another question"):
        sweep(results, "+method=simpo,dpo", "decide.margin=0.2")


@pytest.mark.parametrize("expected", ["simpo", "dpo", "tie", "inconclusive", "trade-off"])
def test_the_exit_status_says_whether_the_verdict_is_the_expected_one(expected: str, results: Path, capsys) -> None:
    result = sweep(results, "+method=simpo,dpo", f"expect={expected}")
    assert result.verdict is not None
    found = result.verdict["verdict"]
    status = print_result(result)
    said = capsys.readouterr().out.splitlines()
    assert status == (0 if found == expected else 3)
    assert (f"expected {expected}, and the verdict is {found}" in said) is (found != expected)
    assert said[-1].startswith("recommendation: Ship ")


def test_an_expectation_that_nothing_can_meet_is_refused_before_any_training(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expect=orpo: no verdict on these arms can be that; allowed: simpo, dpo, tie"):
        sweep(tmp_path, "+method=simpo,dpo", "expect=orpo")
    assert not list(tmp_path.rglob("manifest.json"))


def test_the_words_are_the_same_everywhere(results: Path, capsys) -> None:
    from harness.report.dashboard import dashboard_page

    result = sweep(results, "+method=simpo,dpo")
    print_result(result)
    line = capsys.readouterr().out.splitlines()[-1].removeprefix("recommendation: ")
    told = read_json(results / "small" / "verdict.json")["recommendation"]
    assert line.endswith(f"{told['why']} {told['next']}")
    shown = [(results / "small" / name).read_text() for name in ("report.html",)] + [dashboard_page(results)]
    for page in shown:
        assert line in page.replace("&#39;", "'").replace("&#34;", '"')


@pytest.mark.parametrize("more", [["plan=true"], []])
def test_a_guard_says_how_often_an_equal_arm_passes_it(more: list[str], results: Path, capsys) -> None:
    run_sweep(overriding(SMALL, f"results_dir={results}", "study=small", "+method=simpo,dpo", *more))
    said = capsys.readouterr().out
    assert "guard checks: a winner that is truly equal on it passes a margin of 30 points in about " in said
    assert "(1 seed an arm, 24 golden prompts, assumed spreads)" in said
