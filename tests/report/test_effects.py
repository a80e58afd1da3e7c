"""Effects over arms and studies: slopes over a family's levels, and the main effects of SimPO's ingredients."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from harness.config.arms import ARMS
from harness.decide.stats import compare, contrast
from harness.report.claims import Claim, claims
from harness.report.effects import (
    INGREDIENTS,
    effects,
    family_table,
    ingredient_table,
    levels_of,
    slope_difference,
)
from harness.report.page import render_report
from harness.report.study import read_study
from tests.study_fixture import build_study


def robustness(folder: Path) -> Claim:
    """Return the claim that is tested on a family's slopes."""
    (found,) = [one for one in claims(read_study(folder)) if one.claim.startswith("is less robust")]
    return found


def family(folder: Path, slopes: dict[str, float], levels: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3)) -> list[Path]:
    """Studies that differ in label noise; an arm loses `slope` of its score for each unit of noise, exactly."""
    made = []
    for level in levels:
        study = build_study(folder / f"noise-{level:g}", bare=True)
        scores = pd.read_csv(study / "scores.csv", keep_default_na=False)
        golden = (scores["split"] == "golden") & (scores["scorer"] == "checks")
        for arm, slope in slopes.items():
            mine = golden & (scores["arm"] == arm)
            place = scores.loc[mine, "prompt_id"].rank(method="dense")
            scores.loc[mine, "score"] = 0.6 + 0.002 * (place - place.mean()) / place.max() + slope * level
        scores.to_csv(study / "scores.csv", index=False)
        settings = yaml.safe_load((study / "study.yaml").read_text())
        settings.pop("sha256", None)
        settings["family"] = {"name": "noise", "key": "data.label_noise", "value": level}
        (study / "study.yaml").write_text(yaml.safe_dump(settings))
        made.append(study)
    return made


def test_robustness_is_the_difference_of_the_slopes(tmp_path: Path) -> None:
    """SimPO loses 9 points for each 10% of noise, DPO 4: a difference of -5 points."""
    made = family(tmp_path, {"simpo": -0.9, "dpo": -0.4})
    found = robustness(made[0])
    assert found.status == "holds"
    assert "points for each 10% of labels flipped: −9.0 and −4.0; difference −5.0" in found.figure
    assert robustness(made[3]) == found, "every study of the family says the same"


def test_slopes_are_those_of_least_squares_on_the_run_means(tmp_path: Path) -> None:
    made = family(tmp_path, {})
    levels = levels_of(read_study(made[0]))
    for level in levels:
        level.arms.update({arm: replace(scores, values=scores.values.copy()) for arm, scores in level.arms.items()})
    rng = np.random.default_rng(0)
    for level in levels:
        for scores in level.arms.values():
            scores.values[:] = rng.random(scores.values.shape)
    slopes = {
        arm: np.polyfit([x.value for x in levels], [x.arms[arm].values.mean(1) for x in levels], 1)[0]
        for arm in ("simpo", "dpo")
    }
    found = slope_difference(levels)
    assert found.difference == pytest.approx(slopes["simpo"].mean() - slopes["dpo"].mean())
    assert found.seed_variance == pytest.approx(sum(values.var(ddof=1) / 3 for values in slopes.values()))


def test_a_family_with_other_prompts_or_too_few_levels_is_not_tested(tmp_path: Path) -> None:
    two = family(tmp_path / "two", {}, (0.0, 0.1))
    assert "2 of its levels are scored, and a slope needs 3" in robustness(two[0]).figure
    made = family(tmp_path / "other", {})
    scores = pd.read_csv(made[1] / "scores.csv", keep_default_na=False)
    first = scores.loc[scores["split"] == "golden", "prompt_id"].iloc[0]
    scores[scores["prompt_id"] != first].to_csv(made[1] / "scores.csv", index=False)
    assert "noise-0.1 has other seeds or golden prompts" in robustness(made[0]).figure
    (made[1] / "scores.csv").write_text("nonsense")
    assert len(levels_of(read_study(made[0]))) == 3


def test_every_member_shows_the_family(tmp_path: Path) -> None:
    made = family(tmp_path, {"simpo": -0.9, "dpo": -0.4})
    table = family_table(read_study(made[2]))
    assert table is not None
    assert list(table.frame.index) == [
        *("data.label_noise=0", "data.label_noise=0.1", "data.label_noise=0.2 (this study)", "data.label_noise=0.3")
    ]
    assert table.frame.loc["data.label_noise=0.3", "simpo"] == "33.0%"
    assert table.frame.loc["data.label_noise=0.3", "Difference, points"] == "−15.0"
    render_report(made[2])
    for page in ("report.html", "report.md"):
        assert "The same study at other values of data" in (made[2] / page).read_text()


def test_the_eight_arms_are_all_combinations_of_the_three_ingredients() -> None:
    forms = {tuple(one.has(arm) for one in INGREDIENTS) for arm in ARMS.values() if arm.trainer}
    assert forms == set(itertools.product([False, True], repeat=3))
    assert [one.has(ARMS["simpo"]) for one in INGREDIENTS] == [True, True, True]
    assert [one.has(ARMS["dpo"]) for one in INGREDIENTS] == [False, False, False]


def planted(arm: str, rng: np.random.Generator, prompts: np.ndarray) -> np.ndarray:
    """Scores of an arm: the mean over tokens gives 6 points, the margin 2, leaving out the reference nothing."""
    level = 0.5 + 0.06 * ARMS[arm].per_token + 0.02 * ARMS[arm].has_margin
    return level + prompts + rng.normal(0, 0.01, (5, 1)) + rng.normal(0, 0.2, (5, len(prompts)))


def test_main_effects_recover_what_was_planted() -> None:
    rng = np.random.default_rng(0)
    prompts = rng.normal(0, 0.2, 600)
    scores = {name: planted(name, rng, prompts) for name, arm in ARMS.items() if arm.trainer}
    found = effects(scores)
    assert [pairs for pairs, _ in found.values()] == [4, 4, 4]
    for (_, components), truth in zip(found.values(), (0.0, 0.06, 0.02), strict=True):
        low, high = components.interval(0.95)
        assert low < truth < high
        assert high - low < 0.05


def test_an_effect_of_one_pair_of_arms_is_their_comparison() -> None:
    rng = np.random.default_rng(1)
    scores = {arm: rng.random((3, 40)) for arm in ("dpo", "dpo_norm", "simpo")}
    found = effects(scores)
    assert set(found) == {"Mean over tokens instead of the sum"}
    pairs, components = found["Mean over tokens instead of the sum"]
    assert pairs == 1
    assert components == compare(scores["dpo_norm"], scores["dpo"])


def test_a_contrast_of_three_arms_by_hand() -> None:
    """Weights (1, -1/2, -1/2), two seeds, two prompts, no noise within a run: only the seeds vary."""
    arms = [np.array([[m, m], [m + 0.2, m + 0.2]]) for m in (0.5, 0.3, 0.1)]
    found = contrast(arms, [1.0, -0.5, -0.5])
    assert found.difference == pytest.approx(0.3)
    assert found.seed_variance == pytest.approx((1 + 0.25 + 0.25) * 0.02 / 2)
    assert found.seed_df == pytest.approx(1.5**2 / (1 + 0.0625 + 0.0625))
    assert found.prompt_variance == 0.0


def test_a_report_shows_the_effects_where_the_arms_allow_it(tmp_path: Path) -> None:
    """Two arms have none; with the two between them, each ingredient that they differ in has its row."""
    folder = build_study(tmp_path / "study", prompts=12, bare=True)
    assert ingredient_table(read_study(folder)) is None
    scores = pd.read_csv(folder / "scores.csv", keep_default_na=False)
    copies = [
        scores[scores["arm"] == old].assign(arm=new) for old, new in (("dpo", "dpo_norm"), ("simpo", "simpo_no_margin"))
    ]
    pd.concat([scores, *copies]).to_csv(folder / "scores.csv", index=False)
    table = ingredient_table(read_study(folder))
    assert table is not None
    assert list(table.frame.index) == [one.name for one in INGREDIENTS]
    assert table.frame.loc["Target margin", "Effect, points"] == "0.0"
    assert table.frame.loc["Mean over tokens instead of the sum", "Effect, points"] == "0.0"
    assert table.frame.loc["No reference model", "Pairs of arms"] == "1"
    render_report(folder)
    for page in ("report.html", "report.md"):
        assert "Which part of SimPO makes the difference" in (folder / page).read_text()
