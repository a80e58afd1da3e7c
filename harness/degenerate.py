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
COLLAPSED_SHARES = {"degenerate": 0.5, "same_answer": 0.9}
MIN_RISE = 0.4
CUT_OFF_SHARE = 0.5
UNCHANGED_SHARE = 0.9
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
    """Say whether a policy collapsed: most answers degenerate, or nearly all the same, and far more so than the base's.

    An answer that passes its checks (`passed`) never counts: ninety times "yes" is right where yes is the answer.
    Answers that are cut off do not count either, only warn: an arm may lengthen answers (see `cut_off_warnings`).
    """
    if len(completions) < MIN_PROMPTS:
        return False
    policy, before = _failed_shares(completions), _failed_shares(base)
    return any(
        policy.get(kind, 0.0) >= limit and policy[kind] - before.get(kind, 0.0) >= MIN_RISE
        for kind, limit in COLLAPSED_SHARES.items()
    )


def _failed_shares(completions: Sequence[Any]) -> dict[str, float]:
    """Return `degenerate_shares` of the answers that do not pass their checks, as shares of all answers."""
    failed = [row for row in completions if not row.get("passed")]
    return {kind: share * len(failed) / len(completions) for kind, share in degenerate_shares(failed).items()}


def unchanged_warnings(completions: Sequence[Any], base: Sequence[Any]) -> list[str]:
    """Warn of each split on which the answers are the base's, word for word: training has hardly changed the policy."""
    before = {(row["split"], row["prompt_id"]): row["completion"] for row in base}
    warnings = []
    for split in sorted({row["split"] for row in completions}):
        same = [
            row["completion"] == before[split, row["prompt_id"]]
            for row in completions
            if row["split"] == split and (split, row["prompt_id"]) in before
        ]
        share = sum(same) / len(same) if len(same) >= MIN_PROMPTS else 0.0
        if share >= UNCHANGED_SHARE:
            warnings.append(
                f"{share:.0%} of the answers to {split} are the SFT base's own, word for word: training has hardly "
                "changed the policy; look at the learning rate, the number of pairs and of epochs"
            )
    return warnings


def cut_off_warnings(shares: dict[str, dict[str, float]], base: dict[str, dict[str, float]]) -> list[str]:
    """Warn of each split on which most answers were cut off and the base's were not: their scores are of stumps."""
    return [
        f"{found['cut_off']:.0%} of the answers to {split} were cut off at generate.max_new_tokens, of the base's "
        f"{base.get(split, {}).get('cut_off', 0.0):.0%}; raise it, or this arm is judged on stumps"
        for split, found in shares.items()
        if found["cut_off"] > CUT_OFF_SHARE and found["cut_off"] - base.get(split, {}).get("cut_off", 0.0) > MIN_RISE
    ]
