"""When a policy has collapsed: its answers and the base's, with their flags -> whether it counts as worst.

A policy has collapsed where most of its answers are degenerate (empty, or a repetition), nearly all are the same, or
most run to the token limit while fewer pass their checks, and the base's do not.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import NotRequired, TypedDict

COLLAPSED_SHARES = {"degenerate": 0.5, "same_answer": 0.9}
CUT_OFF_SHARE = 0.5
MIN_RISE = 0.4
MIN_PROMPTS = 10
UNCHANGED_SHARE = 0.9  # of the answers, equal to the base's word for word: training has hardly moved the policy
_STANDARD_ERRORS = 2.0  # by which a share of passes has fallen


class FlaggedRow(TypedDict):
    """A completion and its flags."""

    completion: str
    flags: list[str]


class CheckedRow(FlaggedRow):
    """The same, with whether it passes all checks of its prompt."""

    passed: NotRequired[bool]


def degenerate_shares(completions: Sequence[FlaggedRow]) -> dict[str, float]:
    """Return shares in [0, 1] of the completions: of each flag, `same_answer` (the most frequent one), `degenerate`.

    Empty without completions.
    """
    if not completions:
        return {}
    total = len(completions)
    counts = Counter(flag for row in completions for flag in row["flags"])
    shares = {flag: counts[flag] / total for flag in ("empty", "cut_off", "repetition")}
    answers = Counter(row["completion"].strip() for row in completions if not _is_unanswered(row))
    shares["same_answer"] = max(answers.values(), default=0) / total
    shares["degenerate"] = sum(1 for row in completions if {"empty", "repetition"} & set(row["flags"])) / total
    return shares


def _is_unanswered(row: FlaggedRow) -> bool:
    """Return whether the policy was cut off while it thought: it has given no answer, and so not the same one."""
    return not row["completion"].strip() and "empty" not in row["flags"]


def is_collapsed(completions: Sequence[CheckedRow], base: Sequence[CheckedRow]) -> bool:
    """Return whether a policy has collapsed, measured against the base.

    Answers that pass their checks do not count: ninety times "yes" is right where yes is the answer. Answers that are
    cut off count only where fewer answers pass than the base's: an arm may lengthen its answers and be right.
    """
    if len(completions) < MIN_PROMPTS:
        return False
    policy, before = _shares_of_failed(completions), _shares_of_failed(base)
    if any(
        policy.get(kind, 0.0) >= limit and policy[kind] - before.get(kind, 0.0) >= MIN_RISE
        for kind, limit in COLLAPSED_SHARES.items()
    ):
        return True
    cut_off = degenerate_shares(base).get("cut_off", 0.0)
    return runs_to_the_limit(_failed_at_the_limit(completions), cut_off) and has_fallen(completions, base)


def runs_to_the_limit(share: float, base: float) -> bool:
    """Return whether most answers were cut off at the token limit, and the base's were not; shares in [0, 1]."""
    return share > CUT_OFF_SHARE and share - base > MIN_RISE


def _failed_at_the_limit(completions: Sequence[CheckedRow]) -> float:
    """Return the share of answers that were cut off and fail; a policy that was cut off while it thought gave none."""
    failed = [row for row in completions if "cut_off" in row["flags"] and not row.get("passed")]
    return sum(not _is_unanswered(row) for row in failed) / len(completions) if completions else 0.0


def has_fallen(completions: Sequence[CheckedRow], base: Sequence[CheckedRow]) -> bool:
    """Return whether fewer answers pass their checks than the base's, by more than two standard errors."""
    if not completions or not base:
        return False
    rates = [sum(bool(row.get("passed")) for row in rows) / len(rows) for rows in (completions, base)]
    variances = [rate * (1 - rate) / len(rows) for rate, rows in zip(rates, (completions, base), strict=True)]
    return rates[1] - rates[0] > _STANDARD_ERRORS * math.sqrt(sum(variances))


def _shares_of_failed(completions: Sequence[CheckedRow]) -> dict[str, float]:
    """Return `degenerate_shares` of the answers that fail their checks, as shares of all answers."""
    failed = [row for row in completions if not row.get("passed")]
    return {kind: share * len(failed) / len(completions) for kind, share in degenerate_shares(failed).items()}
