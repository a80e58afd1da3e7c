"""Configs that were selected on dev: the level of the verdict, and how sure the selection is."""

from __future__ import annotations

import numpy as np
import pandas as pd

from harness.decide import verdict
from harness.decide.beside import choice_caveats, length_caveats_of
from tests.decide.test_rule import WIN, frame


def tuned(levels: dict[str, float], *, seeds: int = 3, prompts: int = 100) -> pd.DataFrame:
    """Return golden scores of config c, and dev scores of SimPO's configs with these means."""
    rng = np.random.default_rng(1)
    rows = [
        {
            "arm": "simpo", "config": config, "seed": 100 + seed, "split": "dev", "prompt_id": f"d{prompt}",
            "scorer": "checks", "score": float(rng.random() < level), "stage": "select",
        }
        for config, level in levels.items()
        for seed in range(seeds)
        for prompt in range(prompts)
    ]  # fmt: skip
    golden = frame({**WIN, "sft": [0.45]}).assign(stage="confirm")
    return pd.concat([golden, pd.DataFrame(rows)])


def test_after_tuning_two_configs_are_compared_and_not_two_methods() -> None:
    found = verdict(tuned({"c": 0.6, "d": 0.55}))
    assert found["level"] == "config"
    assert found["reason"].startswith("This SimPO config beats this DPO config by 9.7 points")
    assert "another search may select others" in found["reason"]
    assert found["recommendation"]["why"].startswith("This SimPO config beats this DPO config")
    assert "not the methods" in found["recommendation"]["next"]


def test_a_selection_among_equal_configs_is_a_coin_and_a_clear_one_is_not() -> None:
    close = verdict(tuned({"c": 0.6, "d": 0.6}))["selection"]["simpo"]
    clear = verdict(tuned({"c": 0.9, "d": 0.3}))["selection"]["simpo"]
    assert 0.1 < close["others_selected"] < 0.9
    assert clear["others_selected"] == 0
    assert (close["configs"], close["tuning_seeds"], close["selected"]) == (2, 3, "c")
    assert close["dev_ci95"][0] < close["dev_mean"] < close["dev_ci95"][1]


def test_how_sure_the_selection_is_stands_beside_the_recommendation() -> None:
    (said,) = verdict(tuned({"c": 0.6, "d": 0.55}))["caveats"]
    assert said.startswith("configs are compared, not methods")
    assert "SimPO: of 2 configs, another one is selected in " in said
    assert "of 1,000 resamples of 3 tuning seeds and dev prompts" in said
    (one_seed,) = verdict(tuned({"c": 0.6, "d": 0.55}, seeds=1))["caveats"]
    assert "of 1,000 resamples of dev prompts" in one_seed


def test_configs_that_were_given_up_early_are_no_rivals() -> None:
    scores = tuned({"c": 0.6, "d": 0.55})
    given_up = scores[(scores["config"] != "d") | (scores["seed"] == 100)]
    assert verdict(given_up)["selection"]["simpo"]["configs"] == 1
    assert "no rival is resampled" in verdict(given_up)["caveats"][0]


def test_without_tuning_methods_are_compared() -> None:
    found = verdict(tuned({"c": 0.6}))
    assert found["level"] == "method"
    assert "selection" not in found
    assert found["caveats"] == []


def kinds(raw: str, controlled: str) -> pd.DataFrame:
    """Return scores of two kinds, of which the length-controlled one has the other winner."""
    turned = frame({"simpo": WIN["dpo"], "dpo": WIN["simpo"]}, scorer=controlled)
    return pd.concat([frame(WIN, scorer=raw), turned])


def test_that_the_metric_decides_is_said_for_every_pair_of_kinds() -> None:
    for raw, controlled in (
        ("win_rate", "length_controlled"),
        ("judge", "length_controlled"),
        ("win_rate", "length_controlled_minimal"),
    ):
        scores = kinds(raw, controlled)
        for metric, winner in ((raw, "DPO wins"), (controlled, "SimPO wins")):
            (said,) = length_caveats_of(scores, verdict(scores, metric=metric))
            assert said.startswith("the metric decides: the ")
            assert winner in said


def test_kinds_that_agree_are_not_mentioned() -> None:
    scores = pd.concat([frame(WIN, scorer="win_rate"), frame(WIN, scorer="length_controlled")])
    assert length_caveats_of(scores, verdict(scores, metric="win_rate")) == []


def test_a_metric_that_was_chosen_after_the_scores_is_said() -> None:
    (said,) = choice_caveats(kinds("win_rate", "length_controlled"), "win_rate")
    assert said.startswith("the metric was chosen after the scores were there: win_rate, beside length_controlled")
    assert choice_caveats(frame(WIN), "checks") == []
