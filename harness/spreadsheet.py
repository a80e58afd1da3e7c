"""Text in CSV files, written so that a spreadsheet program does not take it for a formula, and read back unchanged.

A cell that begins with one of `= + - @`, tab or carriage return gets an apostrophe before it, as OWASP advises ("CSV
Injection"); a text that begins with an apostrophe gets one too where it could be mistaken for such a cell.
"""

from __future__ import annotations

import csv
import re
from typing import Any

import pandas as pd

_STARTS = re.compile(r"'*[=+\-@\t\r]")
_ESCAPED = re.compile(r"'+[=+\-@\t\r]")


def to_csv(frame: pd.DataFrame) -> str:
    """Return the frame as CSV; numbers stay numbers, text is harmless."""
    safe = frame.map(_escaped)
    # Python's writer leaves a lone carriage return unquoted, and its reader ends the line there.
    lone = safe.map(lambda value: isinstance(value, str) and "\r" in value).any(axis=None)
    return safe.to_csv(index=False, quoting=csv.QUOTE_NONNUMERIC if lone else csv.QUOTE_MINIMAL)


def _escaped(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and _STARTS.match(value) else value


def original(text: str) -> str:
    """Return the text that a cell stood for."""
    return text[1:] if _ESCAPED.match(text) else text
