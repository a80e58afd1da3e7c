"""Detect degenerate output: empty, cut off at the token limit, an n-gram repeated, one answer to everything."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

# A unit of up to 40 characters, at least six times in a row. Bounded, so that hostile text cannot make it slow.
_REPEATED = re.compile(r"(.{1,40}?)\1{5,}", re.DOTALL)
_SCANNED_CHARS = 2000
COLLAPSED_SHARE = 0.5
MIN_PROMPTS = 10


def completion_flags(completion: str, *, ended: bool) -> list[str]:
    """Name what is wrong with one completion: `empty`, `cut_off`, `repetition`; an empty list where nothing is.

    `repetition` needs a run of at least 20 characters that makes up half of the (last 2,000 characters of the) text:
    a table's rule or a list of zeros in a long answer is not degenerate.
    """
    text = completion.strip()
    flags = [] if text else ["empty"]
    if not ended:
        flags.append("cut_off")
    tail = text[-_SCANNED_CHARS:]
    longest = max((len(match.group()) for match in _REPEATED.finditer(tail)), default=0)
    if longest >= 20 and longest >= len(tail) / 2:
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
    """Say whether a policy collapsed: most of its answers are degenerate or the same, and the base's were not."""
    if len(completions) < MIN_PROMPTS:
        return False
    policy, before = degenerate_shares(completions), degenerate_shares(base)
    kinds: Iterable[str] = ("degenerate", "same_answer")
    return any(policy[kind] > COLLAPSED_SHARE >= before.get(kind, 0.0) for kind in kinds)
