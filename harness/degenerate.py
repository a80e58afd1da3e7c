"""Detect degenerate output: empty, cut off at the token limit, an n-gram repeated, one answer to everything."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

# A unit of up to 40 characters, several times in a row. Bounded, so that hostile text cannot make it slow. An answer
# that was cut off in the middle of a loop needs fewer repeats: what came before the limit is all that there is to see.
_REPEATED = re.compile(r"(.{1,40}?)\1{5,}", re.DOTALL)
_CUT_LOOP = re.compile(r"(.{1,40}?)\1{3,}", re.DOTALL)
_SCANNED_CHARS = 2000
COLLAPSED_SHARE = 0.5
NEVER_ENDS_SHARE = 0.9
MIN_PROMPTS = 10


def completion_flags(completion: str, *, ended: bool) -> list[str]:
    """Name what is wrong with one completion: `empty`, `cut_off`, `repetition`; an empty list where nothing is.

    `repetition` needs a run of at least 20 characters (8 where the answer was cut off) that makes up half of the last
    2,000 characters: a table's rule or a list of zeros in a long answer is not degenerate.
    """
    text = completion.strip()
    flags = [] if text else ["empty"]
    if not ended:
        flags.append("cut_off")
    pattern, shortest = (_REPEATED, 20) if ended else (_CUT_LOOP, 8)
    tail = text[-_SCANNED_CHARS:]
    longest = max((len(match.group()) for match in pattern.finditer(tail)), default=0)
    if longest >= shortest and longest >= len(tail) / 2:
        flags.append("repetition")
    return flags


def degenerate_shares(completions: Sequence[Any]) -> dict[str, float]:
    """Return the share of completions with each flag, and of the most frequent answer (`same_answer`).

    Args:
        completions: rows with `completion` and `flags`.
    """
    if not completions:
        return {}
    total = len(completions)
    counts = Counter(flag for row in completions for flag in row["flags"])
    shares = {flag: counts[flag] / total for flag in ("empty", "cut_off", "repetition")}
    answers = Counter(row["completion"].strip() for row in completions)
    shares["same_answer"] = answers.most_common(1)[0][1] / total
    shares["degenerate"] = sum(1 for row in completions if {"empty", "repetition"} & set(row["flags"])) / total
    return shares


def is_collapsed(completions: Sequence[Any], base: Sequence[Any]) -> bool:
    """Say whether a policy collapsed, measured against the base.

    Most of its answers are degenerate, or one and the same, where the base's were not; or it hardly ever ends its turn
    where the base mostly did.
    """
    if len(completions) < MIN_PROMPTS:
        return False
    policy, before = degenerate_shares(completions), degenerate_shares(base)
    limits = {"degenerate": COLLAPSED_SHARE, "same_answer": COLLAPSED_SHARE, "cut_off": NEVER_ENDS_SHARE}
    return any(policy[kind] > limit and before.get(kind, 0.0) <= COLLAPSED_SHARE for kind, limit in limits.items())
