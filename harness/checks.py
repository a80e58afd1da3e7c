"""Verifiable checks on one completion: `equals`, `contains`, `excludes`, `regex`, `max_words`, `min_words`, `json`,
`ends_properly`. A check is a mapping with one key, as in `{"max_words": 3}`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# What an answer may end with when it ends on purpose: closing punctuation, quotes, brackets, a code fence or emphasis.
_PROPER_END = re.compile(r"[.!?…。！？:;)\]}>\"'”’»`*|]$")


def _texts(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


# Each takes (answer without outer white space, the check's value, whether the policy ended its turn).
CHECKS: dict[str, Callable[[str, Any, bool], bool]] = {
    "equals": lambda text, value, _: text in [t.strip() for t in _texts(value)],  # a list: any of them
    "contains": lambda text, value, _: all(t in text for t in _texts(value)),  # a list: all of them
    "excludes": lambda text, value, _: not any(t in text for t in _texts(value)),  # a list: none of them
    "regex": lambda text, value, _: re.search(value, text) is not None,
    "max_words": lambda text, value, _: len(text.split()) <= value,
    "min_words": lambda text, value, _: len(text.split()) >= value,
    "json": lambda text, value, _: _is_json(text),
    "ends_properly": lambda text, value, ended: ended and _PROPER_END.search(text) is not None,
}


def failed_checks(completion: str, checks: Sequence[Mapping[str, Any]], *, ended: bool) -> list[str]:
    """Return the checks that the completion fails, each as `kind: value`; case counts, outer white space does not."""
    text = completion.strip()
    return [
        f"{kind}: {value}" for check in checks for kind, value in check.items() if not CHECKS[kind](text, value, ended)
    ]
