"""Calibration: the rule's error rates hold where they are promised, and the command says what a study can find."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from harness.calibrate import calibrate, main, read_setting
from harness.decide.scores_file import ArmScores
from harness.decide.simulate import (
    Setting,
    components_of,
    detectable_before,
    draw,
    halves,
    observed,
    simulate,
    verdict_of,
)
from harness.decide.stats import compare
from tests.study_fixture import build_study

RUN_SDS = {"none": (0.0, 0.0), "small": (0.01, 0.01), "large": (0.05, 0.05), "unequal": (0.005, 0.04)}
REPEATS = 250
GRID = [*itertools.product((3, 5, 8), (100, 300), RUN_SDS, (1, 5)), *itertools.product((3,), (800,), RUN_SDS, (1, 5))]


def arms_of(scores: list[np.ndarray], clusters: np.ndarray | None = None) -> dict[str, ArmScores]:
    prompts = tuple(map(str, range(scores[0].shape[1])))
    labels = np.array(prompts) if clusters is None else clusters.astype(str)
    return {
        name: ArmScores("c", tuple(map(str, range(len(values)))), prompts, values, labels, {})
        for name, values in zip(("simpo", "dpo"), scores, strict=True)
    }


@pytest.mark.slow
def test_false_winners_and_false_ties_stay_below_alpha_everywhere() -> None:
    """Seeds x prompts x seed variance x clusters: no cell beyond 5% by 4 standard errors, none pooled beyond by 3.

    The standard error of a cell is 1.4 points, that of the mean over the 56 cells 0.2. The same scores serve both
    rates: moved apart by the margin, they are draws with a true difference of the margin.
    """
    winners, ties = {}, {}
    for number, (seeds, prompts, run_sd, size) in enumerate(GRID):
        setting = Setting((seeds, seeds), prompts, cluster_size=size, run_sd=RUN_SDS[run_sd])
        rng, words = np.random.default_rng(number), []
        for _ in range(REPEATS):
            first, second = draw(setting, 0.0, rng)
            words.append((verdict_of([first, second], setting), verdict_of([first + setting.margin, second], setting)))
        winners[seeds, prompts, run_sd, size] = np.mean([null in ("simpo", "dpo") for null, _ in words])
        ties[seeds, prompts, run_sd, size] = np.mean([apart == "tie" for _, apart in words])
    for found in (winners, ties):
        error = math.sqrt(0.05 * 0.95 / REPEATS)
        assert max(found.values()) <= 0.05 + 4 * error, max(found.items(), key=lambda item: item[1])
        assert np.mean(list(found.values())) <= 0.05 + 3 * error / math.sqrt(len(GRID))
    assert np.mean(list(winners.values())) > 0.01, "a rule that never finds a winner proves nothing"


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [3, 8])
def test_passes_and_fails_keep_the_rates_too(seeds: int) -> None:
    setting = Setting((seeds, seeds), 300, passes=True, cluster_size=5)
    null = simulate(setting, 0.0, repeats=500)
    assert null["simpo"] + null["dpo"] <= 0.05 + 4 * math.sqrt(0.05 * 0.95 / 500)
    assert simulate(setting, 0.05, repeats=500)["tie"] <= 0.05 + 4 * math.sqrt(0.05 * 0.95 / 500)


@pytest.mark.slow
def test_registered_looks_keep_alpha_and_peeking_does_not() -> None:
    looks = Setting((8, 8), 300, looks=(3, 5, 8))
    peeking = Setting((8, 8), 300, looks=tuple(range(2, 9)), alpha=0.05 * 7)  # every seed at an uncorrected 5%
    repeats = 600
    planned, peeked = (simulate(s, 0.0, repeats=repeats) for s in (looks, peeking))
    assert planned["simpo"] + planned["dpo"] <= 0.05
    assert peeked["simpo"] + peeked["dpo"] > 0.05 + 3 * math.sqrt(0.05 * 0.95 / repeats)


def test_one_seed_never_claims_a_method() -> None:
    assert calibrate(Setting((1, 1), 50), target=0.1, repeats=10)["level"] == "checkpoint"
    assert calibrate(Setting((2, 2), 50), target=0.1, repeats=10)["level"] == "method"


def test_drawn_scores_have_the_variances_that_were_asked_for() -> None:
    setting = Setting((400, 400), 200, run_sd=(0.05, 0.02), prompt_sd=0.25, noise_sd=0.3)
    first, second = draw(setting, 0.1, np.random.default_rng(0))
    assert (first.mean() - second.mean()) == pytest.approx(0.1, abs=0.05)
    assert first.mean(1).std() == pytest.approx(math.sqrt(0.05**2 + 0.3**2 / 200), rel=0.1)
    assert second.mean(1).std() == pytest.approx(math.sqrt(0.02**2 + 0.3**2 / 200), rel=0.1)
    assert (first - second).mean(0).std() == pytest.approx(0.25, rel=0.15)


def test_the_components_of_a_study_are_recovered() -> None:
    """Estimated from drawn scores, averaged over studies, against what they were drawn with."""
    truth = Setting((8, 8), 400, cluster_size=4, run_sd=(0.03, 0.01), prompt_sd=0.2, noise_sd=0.3)
    rng = np.random.default_rng(1)
    found = [observed(arms_of(draw(truth, 0.0, rng), truth.clusters), margin=0.05, alpha=0.05) for _ in range(60)]
    assert {one.cluster_size for one in found} == {4}
    assert {(one.seeds, one.prompts) for one in found} == {((8, 8), 400)}
    assert np.mean([one.run_sd[0] ** 2 for one in found]) == pytest.approx(0.03**2, rel=0.2)
    assert np.mean([one.run_sd[1] ** 2 for one in found]) == pytest.approx(0.01**2, rel=0.5)
    assert np.mean([one.prompt_sd**2 for one in found]) == pytest.approx(0.2**2, rel=0.1)
    assert np.mean([one.noise_sd for one in found]) == pytest.approx(0.3, rel=0.02)
    assert np.mean([one.cluster_share for one in found]) == pytest.approx(0.5, abs=0.15)


@pytest.mark.parametrize("setting", [Setting(), Setting((3, 8), 100, cluster_size=5), Setting(passes=True)])
def test_the_formulas_components_are_those_that_the_rule_estimates_on_average(setting: Setting) -> None:
    rng = np.random.default_rng(2)
    found = [compare(*draw(setting, 0.0, rng), setting.clusters) for _ in range(300)]
    expected = components_of(setting)
    assert np.mean([one.seed_variance for one in found]) == pytest.approx(expected.seed_variance, rel=0.15)
    assert np.mean([one.prompt_variance for one in found]) == pytest.approx(expected.prompt_variance, rel=0.15)
    assert found[0].prompt_df == expected.prompt_df


def test_what_is_said_to_be_needed_has_about_the_power_it_promises() -> None:
    result = calibrate(Setting(prompts=150), target=0.08, repeats=300)
    for name in ("seeds", "prompts"):
        found = result["needed"][name]
        if found["count"] is not None:
            assert 0.68 < found["simulated_power"] < 0.95, name
    assert any(result["needed"][name]["count"] for name in ("seeds", "prompts"))


@pytest.mark.parametrize(("margin", "is_said"), [("0.05", True), ("0.03", False), ("0.02", False)])
def test_a_wanted_difference_within_the_margin_is_said_to_end_as_a_tie(margin: str, is_said: bool, capsys) -> None:
    assert main(["--difference", "0.03", "--margin", margin, "--repeats", "20"]) == 0
    assert ("is within the margin" in capsys.readouterr().out) == is_said


def test_more_seeds_and_more_prompts_find_smaller_differences() -> None:
    assert detectable_before(3, 300, alpha=0.05) > detectable_before(5, 300, alpha=0.05)
    assert detectable_before(5, 300, alpha=0.05) > detectable_before(5, 800, alpha=0.05)
    assert 0.04 < detectable_before(5, 300, alpha=0.05) < 0.08


def test_a_look_decides_with_its_share_of_alpha_and_stops() -> None:
    """A difference that the first two seeds show beyond doubt is decided there; the later seeds would turn it."""
    rng = np.random.default_rng(3)
    first, second = rng.normal(0.8, 0.01, (4, 50)), rng.normal(0.2, 0.01, (4, 50))
    first[2:], second[2:] = 0.0, 1.0
    setting = Setting((4, 4), 50, looks=(2, 4))
    assert verdict_of([first, second], setting) == "simpo"
    assert verdict_of([first, second], replace(setting, looks=())) != "simpo"


def test_two_halves_of_one_arms_seeds_seldom_find_a_winner() -> None:
    rng = np.random.default_rng(4)
    setting = Setting((6, 6), 200)
    found = [halves(draw(setting, 0.0, rng)[0], setting) for _ in range(40)]
    assert {splits for splits, _ in found} == {10}, "six seeds have ten splits into three and three"
    assert sum(winners for _, winners in found) <= 0.08 * 400
    five = halves(draw(Setting((5, 5), 50), 0.0, rng)[0], setting)
    assert five[0] == 10, "five seeds have ten splits into two and three"
    split_brain = np.repeat([[0.0], [0.0], [0.0], [1.0], [1.0], [1.0]], 200, axis=1) + rng.normal(0, 0.01, (6, 200))
    assert halves(split_brain, setting) == (10, 1), "half of the runs are another method: the one split that says so"


def test_a_studys_numbers_are_its_own(tmp_path: Path) -> None:
    setting, arms = read_setting(build_study(tmp_path / "study"))
    assert setting.seeds == (3, 3)
    assert setting.prompts == len(arms["simpo"].prompts) == 60
    assert setting.noise_sd > 0.2


def test_the_command_prints_a_table_and_json(tmp_path: Path, capsys) -> None:
    study = build_study(tmp_path / "study", seeds=(0, 1, 2, 3))
    assert main([str(study), "--repeats", "20"]) == 0
    said = capsys.readouterr().out
    for words in (
        "4 and 4 seeds, 60 prompts",
        "false winners",
        "false ties",
        "true difference",
        "3 points",
        "against itself",
    ):
        assert words in said
    assert main(["--seeds", "3", "--prompts", "60", "--repeats", "20", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["setting"]["seeds"] == [3, 3]
    assert [row["difference"] for row in result["power"]] == [0.0, 0.01, 0.02, 0.03, 0.05, 0.08]
    for row in result["power"]:
        assert sum(row[name] for name in ("simpo", "dpo", "tie", "inconclusive")) == pytest.approx(1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no/such"], "no scored study"),
        (["--seeds", "0"], "--seeds: allowed: at least 1"),
        (["--prompts", "8", "--cluster-size", "5"], "at least two clusters"),
        (["--run-sd", "-1"], "--run-sd: allowed: at least 0"),
        (["--alpha", "0.7"], "--alpha: allowed: between 0 and 0.5"),
        (["--difference", "3"], "--difference: allowed: between 0 and 1"),
        (["--looks", "3,x"], "write numbers of seeds"),
        (["--looks", "5,3", "--seeds", "5"], "rising numbers"),
        (["--looks", "3,5", "--seeds", "8"], "the last one is all seeds"),
    ],
)
def test_bad_values_are_refused(arguments: list[str], words: str, capsys) -> None:
    assert main(arguments) == 2
    assert words in capsys.readouterr().err


def test_a_study_with_one_seed_is_refused_by_name(tmp_path: Path, capsys) -> None:
    assert main([str(build_study(tmp_path / "study", seeds=(0,)))]) == 2
    assert "an arm has one seed" in capsys.readouterr().err
