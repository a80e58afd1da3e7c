"""Text -> whether it is JSON by RFC 8259, in time proportional to its length and at any depth.

Python's own reader accepts NaN and Infinity, refuses numbers of more than 4,300 digits, and fails on deep nesting.
"""

from __future__ import annotations

import re
from enum import Enum, auto

_STRING = r'"(?:[^"\\\x00-\x1f]++|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*+"'
_NUMBER = r"-?(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?(?:[eE][+-]?[0-9]++)?"
_TOKEN = re.compile(
    rf"[ \t\n\r]*+(?:(?P<string>{_STRING})|(?P<scalar>{_NUMBER}|true|false|null)|(?P<mark>[\[\]{{}},:])|(?P<end>\Z))"
)


class _Next(Enum):
    """What may come next."""

    VALUE = auto()
    FIRST_ITEM = auto()  # or the end of the array
    FIRST_KEY = auto()  # or the end of the object
    KEY = auto()
    COLON = auto()
    COMMA = auto()  # or the end of the array, the object or the text


def is_json(text: str) -> bool:
    """Return whether the text is one JSON value."""
    expected, position, around = _Next.VALUE, 0, ""
    stack: list[str] = []
    while token := _TOKEN.match(text, position):
        position = token.end()
        kind, value = token.lastgroup, token.group().lstrip(" \t\n\r")
        if kind == "end":
            return expected is _Next.COMMA and not stack
        around = stack[-1] if stack else ""
        if value in ("[", "{") and expected in (_Next.VALUE, _Next.FIRST_ITEM):
            stack.append(value)
            expected = _Next.FIRST_ITEM if value == "[" else _Next.FIRST_KEY
        elif kind != "mark" and expected in (_Next.VALUE, _Next.FIRST_ITEM):
            expected = _Next.COMMA
        elif kind == "string" and expected in (_Next.KEY, _Next.FIRST_KEY):
            expected = _Next.COLON
        elif value == ":" and expected is _Next.COLON:
            expected = _Next.VALUE
        elif value == "," and expected is _Next.COMMA and around:
            expected = _Next.VALUE if around == "[" else _Next.KEY
        elif (value == "]" and around == "[" and expected in (_Next.COMMA, _Next.FIRST_ITEM)) or (
            value == "}" and around == "{" and expected in (_Next.COMMA, _Next.FIRST_KEY)
        ):
            stack.pop()
            expected = _Next.COMMA
        else:
            return False
    return False
