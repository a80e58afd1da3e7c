"""What stands beside a recommendation: scores -> facts that could turn it round, a sentence each."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from harness.config.arms import title
from harness.decide.rule import verdict
from harness.decide.words import difference, listing, pair_word, plain_minus, winner_of
from harness.study.decision import Verdict
from harness.study.errors import UsageError
from harness.study.files import Json

LENGTH_CONTROLLED = "length_controlled"
RAW = ("judge", "reward_model", "win_rate")  # scorers that length control has a form of


def length_caveats(
    scores: pd.DataFrame, *, metric: str, decided: str, arms: tuple[str, str], margin: float, alpha: float
) -> list[str]:
    """Return a sentence where length-controlled and raw scores give different verdicts.

    The other kind of score is decided by the same rule, on the same runs; guards are left out.

    Args:
        scores: those that decided, in long form.
        metric: the scorer that decides.
        decided: its verdict, guards left out.
        arms, margin, alpha: of the rule.
    """
    other = _other_kind(scores, metric)
    if not other:
        return []
    try:
        found = verdict(scores, metric=other, margin=margin, alpha=alpha, arms=arms, others=())
    except UsageError:
        return []
    if found["verdict"] == decided:
        return []
    kinds = ("length-controlled", "raw") if other.startswith(LENGTH_CONTROLLED) else ("raw", "length-controlled")
    shown: dict[str, Json] = {"difference": found["difference"], "ci95": found["ci95"], "alpha": found["alpha"]}
    first, second = map(title, arms)
    return [
        f"the metric decides: the {kinds[0]} scores ({other}) say otherwise than the {kinds[1]} ones ({metric}): "
        f"{pair_word(found['verdict'])}, {first} minus {second} {plain_minus(difference(shown))}; settle first whether "
        "length counts"
    ]


def length_caveats_of(scores: pd.DataFrame, result: Verdict) -> list[str]:
    """Return `length_caveats` of a verdict on these scores."""
    return length_caveats(
        scores,
        metric=result["metric"],
        decided=winner_of(result) or result["verdict"],
        arms=(result["arms"][0], result["arms"][1]),
        margin=result["margin"],
        alpha=result["alpha"],
    )


def _other_kind(scores: pd.DataFrame, metric: str) -> str:
    """Return the raw scorer where a length-controlled one decides, and the other way round; empty without one."""
    names = scorers_on_golden(scores)
    if metric.startswith(LENGTH_CONTROLLED):
        return next((name for name in names if name in RAW), "")
    return next((name for name in names if name.startswith(LENGTH_CONTROLLED)), "")


def choice_caveats(scores: pd.DataFrame, metric: str) -> list[str]:
    """Return a sentence where a metric was chosen among several whose scores were there already."""
    others = [name for name in scorers_on_golden(scores) if name != metric]
    if not others:
        return []
    return [
        f"the metric was chosen after the scores were there: {metric}, beside {listing(others)}; whoever looks at "
        "several and takes the best finds a winner too often. A study of harness.sweep registers its metric before"
    ]


def scorers_on_golden(scores: pd.DataFrame) -> Sequence[str]:
    """Return the scorers that golden has rows of."""
    if "scorer" not in scores:
        return []
    golden = scores[scores["split"] == "golden"] if "split" in scores else scores
    return [str(name) for name in golden["scorer"].unique()]
