"""Completion and verifiable checks -> failed checks; rows of golden sets -> checks.

A check is a mapping with one key, such as `{"max_words": 3}`. The kinds are the keys of `CHECKS`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from harness.data.conversations import RowError, check_unicode, shown
from harness.data.records import Check
from harness.study.files import Json

# Endings of a complete answer: closing punctuation, quotes, brackets, a code fence or emphasis.
_PROPER_END = re.compile(r"[.!?…。！？:;)\]}>\"'”’»`*|]$")


def _as_texts(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


_NUMBER = re.compile(r"[-−]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")


def last_number(text: str) -> float | None:
    """Return the last number of a text, of what stands behind #### where that is there (GSM8K); None without one."""
    found = _NUMBER.findall(text.rpartition("####")[2])
    return float(found[-1].replace(",", "").replace("−", "-")) if found else None


def _is_number(text: str, value: float) -> bool:
    number = last_number(text)
    return number is not None and math.isclose(number, value, rel_tol=1e-9)


# Each takes (answer without outer white space, the check's value, whether the policy ended its turn).
CHECKS: dict[str, Callable[[str, Any, bool], bool]] = {
    "equals": lambda text, value, _: text in [t.strip() for t in _as_texts(value)],  # a list: any of them
    "contains": lambda text, value, _: all(t in text for t in _as_texts(value)),  # a list: all of them
    "excludes": lambda text, value, _: not any(t in text for t in _as_texts(value)),  # a list: none of them
    "regex": lambda text, value, _: re.search(value, text) is not None,
    "max_words": lambda text, value, _: len(text.split()) <= value,
    "min_words": lambda text, value, _: len(text.split()) >= value,
    "number": lambda text, value, _: _is_number(text, value),
    "json": lambda text, value, _: _is_json(text),
    "ends_properly": lambda text, value, ended: ended and _PROPER_END.search(text) is not None,
}


def failed_checks(completion: str, checks: Sequence[Mapping[str, Json]], *, ended: bool) -> list[str]:
    """Return the failed checks, each as `kind: value`; case counts, outer white space does not."""
    text = completion.strip()
    return [
        f"{kind}: {value}" for check in checks for kind, value in check.items() if not CHECKS[kind](text, value, ended)
    ]


def _is_texts(value: Json) -> bool:
    texts = value if isinstance(value, list) else [value]
    return bool(texts) and all(isinstance(text, str) and text for text in texts)


def _is_count(value: Json) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_pattern(value: Json) -> bool:
    try:
        return isinstance(value, str) and value != "" and re.compile(value) is not None
    except (re.error, OverflowError, RecursionError):
        return False


_TEXTS = "a text or a list of texts, none empty"
_ALLOWED: dict[str, tuple[Callable[[Json], bool], str]] = {
    "equals": (_is_texts, _TEXTS),
    "contains": (_is_texts, _TEXTS),
    "excludes": (_is_texts, _TEXTS),
    "regex": (_is_pattern, "a regular expression that Python compiles"),
    "max_words": (_is_count, "a positive whole number"),
    "min_words": (_is_count, "a positive whole number"),
    "number": (lambda value: isinstance(value, int | float) and not isinstance(value, bool), "a number"),
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
    if len(given) != 1:
        raise RowError(f"check {shown(check)}; allowed: a mapping with one key, as {{'max_words': 3}}")
    kind, value = next(iter(given.items()))
    if kind not in _ALLOWED:
        raise RowError(f"check {shown(kind)} is not known; allowed: {', '.join(_ALLOWED)}")
    is_valid, allowed = _ALLOWED[kind]
    if not is_valid(value):
        raise RowError(f"check `{kind}`: {shown(value)}; allowed: {allowed}")
    for text in value if isinstance(value, list) else [value]:
        check_unicode(str(text))
    return {kind: value}
