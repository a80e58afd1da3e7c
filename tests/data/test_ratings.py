"""Ratings beside a pair: what contradicts the label is found under every usual spelling, and nothing else is."""

from __future__ import annotations

from typing import Any

import pytest

from harness.data.conversations import RowError
from harness.data.ratings import is_rating, is_tie

SPELLINGS: list[tuple[str, str]] = [
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen-rating", "rejected-rating"),
    ("rating_chosen", "rating_rejected"),
    ("chosen_avg_rating", "rejected_avg_rating"),
    ("chosenScore", "rejectedScore"),
    ("reward.chosen", "reward.rejected"),
    ("chosen_overall_score", "rejected_overall_score"),
    ("CHOSEN_REWARD", "REJECTED_REWARD"),
    ("avg_score_chosen", "avg_score_rejected"),
    ("gpt4_score_chosen", "gpt4_score_rejected"),
    ("chosen_rm_score", "rejected_rm_score"),
    ("score_w", "score_l"),
    ("winner_rating", "loser_rating"),
    ("quality_chosen", "quality_rejected"),
    ("chosen_response_score", "rejected_response_score"),
    ("rating_chosen_answer", "rating_rejected_answer"),
    ("gpt4o_score_chosen", "gpt4o_score_rejected"),
    ("chosenscore", "rejectedscore"),
    ("SCORECHOSEN", "SCOREREJECTED"),
    ("chosenavgrating", "rejectedavgrating"),
    ("chosen_win_rate", "rejected_win_rate"),
    ("winrate_chosen", "winrate_rejected"),
    ("chosenWinRate", "rejectedWinRate"),
    ("rejectedwinrate".replace("rejected", "chosen"), "rejectedwinrate"),
    ("chosen win probability", "rejected win probability"),
    ("score_positive", "score_negative"),
    ("pos_score", "neg_score"),
    ("reward.good", "reward.bad"),
    ("best_score", "worst_score"),
    ("score_win", "score_loss"),
    ("winning.rating", "losing.rating"),
    ("accepted_elo", "rejected_elo"),
    ("votes_preferred", "votes_unpreferred"),
    ("chosen/score", "rejected/score"),
    ("y_w_score", "y_l_score"),
    ("Chosen Rating", "Rejected Rating"),
]


@pytest.mark.parametrize(("better", "worse"), SPELLINGS)
@pytest.mark.parametrize("as_text", [False, True])
def test_a_rating_against_the_label_is_refused_under_every_spelling(better: str, worse: str, as_text: bool) -> None:
    def given(high: float, low: float) -> dict[str, Any]:
        return {better: str(high) if as_text else high, worse: str(low) if as_text else low, "source": "x"}

    with pytest.raises(RowError, match=r"is lower than .*which answer is better\?"):
        is_tie(given(2.5, 4))
    assert is_tie(given(3, 3))
    assert not is_tie(given(4, 2.5))
    assert is_rating(better)
    assert is_rating(worse)


@pytest.mark.parametrize(
    "row",
    [
        {"scores": {"chosen": 2, "rejected": 7}},
        {"chosen": {"role": "assistant", "content": "a", "score": 2}, "rejected": {"content": "b", "score": 7}},
        {"chosen": [{"content": "q"}, {"content": "a", "rating": 1}], "rejected": [{"content": "b", "rating": 5}]},
        {"metadata": {"chosen_rating": 1, "rejected_rating": 2}},
        {"annotations": {"chosen": {"overall_score": 1}, "rejected": {"overall_score": 2}}},
        {"chosen_ratings": [1, 2, 1], "rejected_ratings": [4, 5, 4]},
        {"chosen_score": "3/10", "rejected_score": "7/10"},
        {"chosen_rating": "30%", "rejected_rating": "70 %"},
        {"margin": -1.5},
        {"score_diff": "-2"},
        {"reward_margin": -0.1},
        {"chosen_rank": 3, "rejected_rank": 1},
        {"scores": [1, 2]},
        {"rewards": ["0.5", "1.5"]},
        {"metadata": {"avg_ratings": [3.5, 4]}},
        {"ranks": [2, 1]},
        {"win_rates": [0.4, 0.6]},
    ],
)
def test_nested_ratings_differences_and_ranks_against_the_label_are_refused(row: dict[str, Any]) -> None:
    with pytest.raises(RowError, match=r"which answer is better\?"):
        is_tie(row)


@pytest.mark.parametrize(
    "row",
    [
        {"chosen_model": 1, "rejected_model": 2},
        {"chosen_logps": -9.0, "rejected_logps": -3.0},
        {"chosen_length": 3, "rejected_length": 30},
        {"chosen_verbosity_score": 1, "rejected_verbosity_score": 2},
        {"score_chosen": 3, "score_rejected": None},
        {"score_chosen": float("nan"), "score_rejected": 3},
        {"chosen_quality_grade": "good", "rejected_quality_grade": "bad"},
        {"chosen_rank": 1, "rejected_rank": 3},
        {"margin": 0.5},
        {"prompt": {"chosen": 1}},
        {"scores": [4, 2]},
        {"scores": [1, 2, 3]},
        {"scores": ["good", "bad"]},
        {"token_scores": [1, 2]},
        {"sentiment_score": {"positive": 0.1, "negative": 0.9}},
        {"positive": 1, "negative": 2},
        {"win_rate": 0.2},
        {"chosen_win_rate": 0.9, "rejected_win_rate": 0.1},
        {"chosen_loss": 1.5, "rejected_loss": 2.5},
        {"chosen_score_vs_rejected": -1},
        {},
    ],
)
def test_numbers_that_rate_nothing_or_agree_say_nothing(row: dict[str, Any]) -> None:
    assert not is_tie(row)


def test_one_contradiction_among_several_ratings_is_enough() -> None:
    with pytest.raises(RowError, match="judge_score_chosen"):
        is_tie({"score_chosen": 3, "score_rejected": 2, "judge_score_chosen": 1, "judge_score_rejected": 2})


def test_two_ratings_that_are_equal_are_a_tie() -> None:
    assert is_tie({"scores": [3, 3]})
    assert not is_tie({"scores": [3, None]})


def test_a_list_of_two_is_named_with_its_places() -> None:
    with pytest.raises(RowError, match=r"`scores\[0\]`=1 is lower than `scores\[1\]`=2: which answer is better\?"):
        is_tie({"scores": [1, 2]})
