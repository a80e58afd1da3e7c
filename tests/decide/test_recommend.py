"""What to ship: the table of the recommendation, on scores that are decided by the rule itself."""

from __future__ import annotations

import pandas as pd
import pytest

from harness.decide import verdict
from harness.decide.recommend import last_lines, recommend, recommendation_line
from harness.study.decision import Verdict
from tests.decide.test_rule import OPEN, TIE, WIN, frame


def decided(means: dict[str, list[float]], *, base: float | None = 0.45, **rule) -> Verdict:
    """Decide on runs with these means and a base; no base for None."""
    everyone = means if base is None else {**means, "sft": [base]}
    return verdict(frame(everyone), **rule)


@pytest.mark.parametrize(
    ("means", "base", "ship", "why"),
    [
        (WIN, 0.45, "simpo", "SimPO is above the SFT base (+15.0 points"),
        (WIN, 0.60, "simpo", "SimPO is not told apart from the SFT base"),
        (WIN, 0.90, "base", "SimPO is below the SFT base (-27.0 points"),
        (WIN, None, "nothing_yet", "Whether training has helped at all is not known"),
        (TIE, 0.45, "either", "differ by less than the 5.0 points that matter"),
        (TIE, 0.90, "base", "SimPO is below the SFT base"),
        (TIE, None, "nothing_yet", "is not known"),
        (OPEN, 0.45, "nothing_yet", "The evidence does not tell SimPO from DPO"),
        (OPEN, 1.20, "base", "DPO is below the SFT base"),
        ({"simpo": WIN["dpo"], "dpo": WIN["simpo"]}, 0.45, "dpo", "DPO beats SimPO by 9.7 points"),
    ],
)
def test_what_to_ship(means: dict[str, list[float]], base: float | None, ship: str, why: str) -> None:
    found = decided(means, base=base)["recommendation"]
    assert found["ship"] == ship
    assert why in found["why"]
    assert found["next"]


def test_an_open_question_says_what_would_settle_it() -> None:
    found = decided(OPEN)
    assert found["to_settle"] is not None
    assert "would find a difference of 5.0 points" in found["recommendation"]["next"] or (
        "A difference of 5.0 points would be found with about" in found["recommendation"]["next"]
    )


def test_a_winner_that_may_be_worse_on_a_guard_is_not_shipped() -> None:
    guarded = frame({"simpo": [0.40, 0.41, 0.40], "dpo": [0.50, 0.51, 0.50]}, scorer="gsm8k")
    scores = pd.concat([frame({**WIN, "sft": [0.45]}), guarded])
    found = verdict(scores, metric="checks", guards=[{"metric": "gsm8k", "margin": 0.02}])
    assert found["verdict"] == "trade-off"
    assert found["recommendation"]["ship"] == "nothing_yet"
    assert "SimPO scores better and may be worse on gsm8k." in found["recommendation"]["why"]


def test_one_seed_recommends_a_model_and_says_how_to_choose_a_method() -> None:
    found = decided({arm: runs[:1] for arm, runs in WIN.items()})
    assert found["recommendation"]["ship"] == "simpo"
    assert "This SimPO checkpoint beats this DPO checkpoint" in found["recommendation"]["why"]
    assert "at least 3 seeds (seed=1,2,3)" in found["recommendation"]["next"]


def test_policies_that_answer_as_the_base_are_not_shipped() -> None:
    """Both have hardly moved: that they tie says nothing of the methods."""
    found = decided(TIE, base=0.50) | {"same_as_base": {"simpo": 0.97, "dpo": 0.40}}
    told = recommend(found)
    assert told["ship"] == "nothing_yet"
    assert "97% of the golden answers of SimPO are the SFT base's own" in told["why"]
    assert "Raise the learning rate" in told["next"]


def test_a_collapsed_arm_is_below_the_base_whatever_its_interval() -> None:
    found = decided(TIE)
    for one in found["against_base"].values():
        one["collapsed"] = True
    told = recommend(found)
    assert told["ship"] == "base"
    assert "SimPO has collapsed (" in told["why"]
    assert "a higher generate.max_new_tokens would not mend" in told["next"]


def test_a_tie_with_one_arm_below_the_base_is_open() -> None:
    found = decided(TIE)
    found["against_base"]["dpo"]["ci95"] = [-0.1, -0.01]
    told = recommend(found)
    assert told["ship"] == "nothing_yet"
    assert "But DPO is below the SFT base" in told["why"]


@pytest.mark.parametrize(
    ("third", "ship", "why"),
    [
        ([0.75, 0.76, 0.75], "dpo_norm", "length-normalised DPO is the one arm that no other arm beats"),
        ([0.40, 0.41, 0.40], "simpo", "SimPO beats DPO"),
        ([0.60, 0.61, 0.59], "simpo", "length-normalised DPO is not told apart from it by this evidence"),
    ],
)
def test_a_third_arm_counts(third: list[float], ship: str, why: str) -> None:
    found = decided({**WIN, "dpo_norm": third})["recommendation"]
    assert found["ship"] == ship
    assert why in found["why"]


def test_the_base_is_recommended_only_where_every_arm_is_below_it() -> None:
    two = decided({**TIE, "dpo_norm": [0.75, 0.76, 0.75]}, base=0.65)["recommendation"]
    assert two["ship"] == "dpo_norm"
    three = decided({**TIE, "dpo_norm": [0.75, 0.76, 0.75]}, base=0.9)["recommendation"]
    assert three["ship"] == "base"


def test_the_last_line_of_a_terminal_is_what_the_pages_show() -> None:
    found = decided(WIN)
    *_, last = last_lines(found)
    assert last == f"recommendation: {recommendation_line(found)}"
    assert last.startswith("recommendation: Ship SimPO. SimPO beats DPO by 9.7 points (95% ")


def test_unfinished_and_old_studies_say_how_to_get_a_recommendation() -> None:
    assert recommendation_line({}).startswith("No recommendation yet. Finish the study")
    assert "python -m harness.decide" in recommendation_line({"verdict": "simpo"})
