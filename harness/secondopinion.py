"""Raw against length-controlled: where the two give different verdicts, the report says so in its first paragraph.

Gemma-2-9b-it is the published case: DPO and SimPO tie by raw win rate and differ by 4.7 points by the controlled one.
"""

from __future__ import annotations

from harness.palette import title
from harness.records import UsageError
from harness.rule import verdict
from harness.study import Study
from harness.wording import interval, levels, number, points

CONTROLLED = "length_controlled"
_RAW = ("judge", "reward_model")  # scorers that a length-controlled one is made of


def disagreement(study: Study) -> str:
    """Return a sentence where the other of the two kinds of score gives another verdict; empty where it does not."""
    other = _other(study)
    decided = str(study.verdict.get("verdict") or "")
    if not other or not decided or len(study.arms) < 2:
        return ""
    first, second = study.arms[:2]
    try:
        found = verdict(
            study.scores,
            metric=other,
            margin=number(study.verdict.get("margin")) or 0.05,
            alpha=number(study.verdict.get("alpha")) or 0.05,
            arms=(first, second),
        )
    except UsageError:
        return ""
    if found["verdict"] == decided:
        return ""
    kinds = ("length-controlled", "raw") if other.startswith(CONTROLLED) else ("raw", "length-controlled")
    return (
        f"The {kinds[0]} scores ({other}) say otherwise than the {kinds[1]} ones that decide: {found['verdict']}, "
        f"{title(first)} minus {title(second)} {points(found['difference'])} points, "
        f"{levels(study)[0]} {interval(found['ci95'])}. "
        "The verdict depends on whether length counts."
    )


def _other(study: Study) -> str:
    names = [str(name) for name in study.scores["scorer"].unique()]
    if study.metric.startswith(CONTROLLED):
        return next((name for name in names if name in _RAW), "")
    return next((name for name in names if name.startswith(CONTROLLED)), "")
