"""Verifiable checks and degenerate output: every check passes one answer and fails another."""

from __future__ import annotations

import time

import pytest

from harness.data.checks import CHECKS, failed_checks
from harness.score.trial_scores import (
    completion_flags,
    cut_off_warnings,
    degenerate_shares,
    is_collapsed,
    unchanged_warnings,
)

CASES = [
    ({"equals": "42"}, " 42\n", "42."),
    ({"equals": ["yes", "Yes"]}, "Yes", "YES"),
    ({"contains": ["red", "blue"]}, "blue and red", "red"),
    ({"excludes": ["sorry", "cannot"]}, "of course", "I cannot"),
    ({"regex": r"^\d{3}$"}, "123", "1234"),
    ({"max_words": 2}, "two words", "three words now"),
    ({"min_words": 2}, "two words", "one"),
    ({"number": 42}, "In all: 1,000 - 958 = 42.", "42 of 43"),
    ({"json": True}, '{"a": [1, 2]}', "{'a': 1}"),
    ({"ends_properly": True}, "It ends.", "It ends and"),
]


@pytest.mark.parametrize(("check", "good", "bad"), CASES, ids=lambda value: str(value)[:24])
def test_a_check_tells_right_from_wrong(check: dict, good: str, bad: str) -> None:
    assert failed_checks(good, [check], ended=True) == []
    kind, value = next(iter(check.items()))
    assert failed_checks(bad, [check], ended=True) == [f"{kind}: {value}"]


def test_every_kind_is_covered_here() -> None:
    assert {next(iter(check)) for check, _, _ in CASES} == set(CHECKS)


def test_an_answer_that_was_cut_off_does_not_end_properly() -> None:
    assert failed_checks("It ends.", [{"ends_properly": True}], ended=False) != []


def test_each_failed_check_is_named() -> None:
    checks = [{"contains": "a"}, {"max_words": 1}, {"excludes": "z"}]
    assert failed_checks("b z", checks, ended=True) == ["contains: a", "max_words: 1", "excludes: z"]


@pytest.mark.parametrize(
    ("text", "ended", "flags"),
    [
        ("A good answer.", True, []),
        (" \n", True, ["empty"]),
        ("It goes on", False, ["cut_off"]),
        ("spam " * 20, True, ["repetition"]),
        ("a" * 40, False, ["cut_off", "repetition"]),
        ("the cat sat on the mat. " * 8, True, ["repetition"]),
        ("75T7T7T7T7T7", False, ["cut_off", "repetition"]),
        ("na na na na na na", True, []),  # six repeats and yet short: a song, not a collapse
        (
            "| a | b |\n|" + "-" * 30 + "|\n" + "Some words of an answer that is longer than the rule above it.",
            True,
            [],
        ),
    ],
)
def test_degenerate_output_is_named(text: str, ended: bool, flags: list[str]) -> None:
    assert completion_flags(text, ended=ended) == flags


def test_hostile_text_does_not_slow_the_detector() -> None:
    start = time.perf_counter()
    completion_flags("ab" * 50_000 + "c", ended=True)
    completion_flags("".join(chr(97 + i % 26) for i in range(100_000)), ended=True)
    assert time.perf_counter() - start < 5  # quadratic growth would take minutes


def rows(*texts: str, ended: bool = True) -> list[dict]:
    return [{"completion": text, "flags": completion_flags(text, ended=ended)} for text in texts]


def test_shares_are_counted() -> None:
    shares = degenerate_shares(rows("x", "x", "", "word " * 30))
    assert shares == {"empty": 0.25, "cut_off": 0.0, "repetition": 0.25, "same_answer": 0.5, "degenerate": 0.5}


def test_a_collapse_is_measured_against_the_base() -> None:
    good = rows(*[f"answer {i}" for i in range(20)])
    same = rows(*["same"] * 19, "answer")
    looping = rows(*["spam " * 20] * 11, *[f"answer {i}" for i in range(9)])
    assert is_collapsed(same, good)
    assert is_collapsed(looping, good)
    assert not is_collapsed(good, good)
    assert not is_collapsed(same, same)  # the base was like that: the data's fault, not the arm's
    assert not is_collapsed(rows("same", "same"), good)  # too few prompts to say


def test_a_frequent_answer_is_no_collapse() -> None:
    """A base that says yes and no in halves, and a policy with a little more yes; or yes always, and rightly."""
    base = rows(*["yes"] * 50, *["no"] * 50)
    assert not is_collapsed(rows(*["yes"] * 52, *["no"] * 48), base)
    assert not is_collapsed(rows(*["yes"] * 80, *["no"] * 20), base)
    always = rows(*["yes"] * 100)
    assert is_collapsed(always, base)
    assert not is_collapsed([row | {"passed": True} for row in always], base)
    assert not is_collapsed([row | {"passed": i < 50} for i, row in enumerate(always)], base)


def test_answers_that_are_cut_off_warn_and_are_no_collapse() -> None:
    """An arm that lengthens its answers beyond the limit is not broken; its scores are of stumps."""
    good, endless = (rows(*[f"answer {i} and so on" for i in range(20)], ended=ended) for ended in (True, False))
    assert not is_collapsed(endless, good)
    shares = {"golden": degenerate_shares(endless)}
    (warning,) = cut_off_warnings(shares, {"golden": degenerate_shares(good)})
    assert warning.startswith("100% of the answers to golden were cut off at generate.max_new_tokens, of the base's 0%")
    assert cut_off_warnings(shares, shares) == []


def test_a_policy_that_answers_as_the_base_does_is_warned_of() -> None:
    """Two steps of training change no greedy answer: a tie between such arms says nothing."""
    base = [{"split": "golden", "prompt_id": str(i), "completion": f"answer {i}"} for i in range(20)]
    (warning,) = unchanged_warnings(base, base)
    assert warning.startswith("100% of the answers to golden are the SFT base's own, word for word")
    half = [row | {"completion": "another"} if i % 2 else row for i, row in enumerate(base)]
    assert unchanged_warnings(half, base) == []
    assert unchanged_warnings(base, []) == []
    assert unchanged_warnings(base[:3], base) == []
