"""Completion and verifiable checks -> failed checks; rows of golden sets -> checks.

A check is a mapping with one key, such as `{"max_words": 3}`; the kinds are the keys of `CHECKS`. Checks of text may
have a second key, `fold`: `{"contains": "it's", "fold": true}` takes all white space for a space and all quotes for
straight ones. Texts are compared in Unicode's normal form NFC. No check takes longer than `SECONDS`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import regex

from harness.data.conversations import RowError, check_unicode, shown
from harness.data.records import Check
from harness.data.rfc8259 import is_json
from harness.data.unicode import count_words, ends_as_sentences_do, fold, last_number, normal, only_number
from harness.study.files import Json
from harness.study.limits import TooSlowError, can_limit, time_limit

SECONDS = 0.3  # of CPU time for one check of one answer
FOLD = "fold"


class UncheckedError(ValueError):
    """A check that took too long, named."""


def _as_texts(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def _pattern(value: str) -> re.Pattern[str]:
    try:
        return re.compile(normal(value))
    except re.error:  # its normal form is no pattern
        return re.compile(value)


def _finds(value: str, text: str) -> bool:
    if can_limit():
        return _pattern(value).search(text) is not None
    try:  # Python's own `re` cannot be stopped here; `regex` differs from it in rare patterns
        return regex.search(value, text, timeout=SECONDS) is not None
    except (TimeoutError, regex.error) as error:
        raise TooSlowError from error


def final_number(text: str) -> float | None:
    """Return the last number of a text, of what stands behind #### where that is there (GSM8K); None without one."""
    return last_number(text.rpartition("####")[2])


def _ends_in_number(text: str, value: float | str) -> bool:
    number, wanted = final_number(text), only_number(value) if isinstance(value, str) else value
    return number is not None and wanted is not None and math.isclose(number, wanted, rel_tol=1e-9)


# Each takes (answer without outer white space, the check's value, whether the policy ended its turn).
CHECKS: dict[str, Callable[[str, Any, bool], bool]] = {
    "equals": lambda text, value, _: text in [t.strip() for t in _as_texts(value)],  # a list: any of them
    "contains": lambda text, value, _: all(t in text for t in _as_texts(value)),  # a list: all of them
    "excludes": lambda text, value, _: not any(t in text for t in _as_texts(value)),  # a list: none of them
    "regex": lambda text, value, _: _finds(value, text),
    "number": lambda text, value, _: _ends_in_number(text, value),  # the last number in the answer
    "max_words": lambda text, value, _: count_words(text) <= value,
    "min_words": lambda text, value, _: count_words(text) >= value,
    "json": lambda text, value, _: is_json(text),
    "ends_properly": lambda text, value, ended: ended and ends_as_sentences_do(text),
}
_TEXT_KINDS = ("equals", "contains", "excludes")
_FOLDABLE = (*_TEXT_KINDS, "regex")


def failed_checks(completion: str, checks: Sequence[Mapping[str, Json]], *, ended: bool) -> list[str]:
    """Return the failed checks, each as `kind: value`; case counts, outer white space does not.

    Raises:
        UncheckedError: for a check that takes longer than `SECONDS`.
    """
    text = normal(completion).strip()
    folded = fold(completion) if any(check.get(FOLD) for check in checks) else text
    return [
        f"{kind}: {value}"
        for check in checks
        for kind, value in check.items()
        if kind != FOLD and not _passes(kind, value, folded if check.get(FOLD) else text, check.get(FOLD), ended=ended)
    ]


def _passes(kind: str, value: Json, text: str, is_folded: Json, *, ended: bool) -> bool:
    name = f"{kind}: {shown(value)}"
    if kind in _TEXT_KINDS:
        value = [(fold if is_folded else normal)(one) for one in _as_texts(value)]
    try:
        with time_limit(SECONDS):
            return CHECKS[kind](text, value, ended)
    except (TooSlowError, RecursionError, MemoryError) as error:
        raise UncheckedError(
            f"the check {name} needs more than {SECONDS:g} s for an answer of {len(text):,} characters"
        ) from error


def _is_texts(value: Json) -> bool:
    texts = value if isinstance(value, list) else [value]
    return bool(texts) and all(isinstance(text, str) and text for text in texts)


def _is_count(value: Json) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_pattern(value: Json) -> bool:
    try:
        return isinstance(value, str) and value != "" and _pattern(value) is not None
    except (re.error, OverflowError, RecursionError):
        return False


def _is_number(value: Json) -> bool:
    if isinstance(value, str):
        return only_number(value) is not None
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


_TEXTS = "a text or a list of texts, none empty"
_ALLOWED: dict[str, tuple[Callable[[Json], bool], str]] = {
    "equals": (_is_texts, _TEXTS),
    "contains": (_is_texts, _TEXTS),
    "excludes": (_is_texts, _TEXTS),
    "regex": (_is_pattern, "a regular expression that Python compiles"),
    "number": (_is_number, "a number, as 42 or '1,234.5'"),
    "max_words": (_is_count, "a positive whole number"),
    "min_words": (_is_count, "a positive whole number"),
    "json": (lambda value: value is True, "true"),
    "ends_properly": (lambda value: value is True, "true"),
}


def read_checks(value: Json) -> tuple[Check, ...]:
    """Read the checks of a row of a golden set.

    Raises:
        RowError: for an unknown check, or a value that is not allowed.
    """
    if value is None:
        return ()
    if not isinstance(value, list):
        raise RowError(
            f"`checks` is of type {type(value).__name__}; allowed: a list of one-key mappings, as [{{'max_words': 3}}]"
        )
    return tuple(_read_check(check) for check in value)


def _read_check(check: Json) -> Check:
    # Parquet gives every mapping all keys of the column, null where they were not there.
    given = {k: v for k, v in check.items() if v is not None} if isinstance(check, Mapping) else {}
    is_folded = given.pop(FOLD, False)
    if len(given) != 1:
        raise RowError(f"check {shown(check)}; allowed: a mapping with one key, as {{'max_words': 3}}, and `fold`")
    kind, value = next(iter(given.items()))
    if kind not in _ALLOWED:
        raise RowError(f"check {shown(kind)} is not known; allowed: {', '.join(_ALLOWED)}")
    is_valid, allowed = _ALLOWED[kind]
    if not is_valid(value):
        raise RowError(f"check `{kind}`: {shown(value)}; allowed: {allowed}")
    for text in value if isinstance(value, list) else [value]:
        check_unicode(str(text))
    if not isinstance(is_folded, bool):
        raise RowError(f"check `{kind}`: `fold` is {shown(is_folded)}; allowed: true or false")
    if is_folded and kind not in _FOLDABLE:
        raise RowError(f"check `{kind}`: `fold` changes nothing here; allowed with {', '.join(_FOLDABLE)}; remove it")
    return {kind: value, FOLD: True} if is_folded else {kind: value}
