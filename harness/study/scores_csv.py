"""Text in CSV files, written so that a spreadsheet program does not take it for a formula, and read back unchanged.

A cell that begins with one of `= + - @`, tab or carriage return gets an apostrophe before it, as OWASP advises ("CSV
Injection"); a text that begins with an apostrophe gets one too where it could be mistaken for such a cell.
"""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pandas as pd

from harness.study.rows import ScoreRow

SCORE_COLUMNS = tuple(ScoreRow.__annotations__)

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


def read_csv(path: Path) -> pd.DataFrame:
    """Read a CSV with a header; every field is text, and an empty one is an empty text.

    Not pandas' reader: it takes the fields that a truncated line lacks, and names such as `NA`, for missing values.

    Raises:
        ValueError: with the number of the line that is cut off or has another number of fields than the header.
    """
    rows: list[list[str]] = []
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file, strict=True)
        try:
            for row in filter(None, lines):
                if rows and len(row) != len(rows[0]):
                    raise ValueError(
                        f"line {lines.line_num} has {len(row)} fields, the header {len(rows[0])}: "
                        "the file was cut off, or a field with a comma is not quoted; write it again"
                    )
                rows.append([original(field) for field in row])
        except csv.Error as error:
            raise ValueError(f"line {lines.line_num}: {error}; was the file cut off?") from error
    if not rows:
        raise ValueError("the file is empty")
    twice = [name for name in rows[0] if rows[0].count(name) > 1]
    if twice:
        raise ValueError(f"column {twice[0]} stands twice")
    return pd.DataFrame(rows[1:], columns=rows[0], dtype=object)


def read_jsonl(path: Path) -> pd.DataFrame:
    """Read one JSON object a line; values keep their JSON types, and a key that a line lacks is missing.

    Not pandas' reader: it makes the number 7 of the text "007".

    Raises:
        ValueError: with the number of the line that is no JSON object.
    """
    rows = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number}: not JSON: {error}; was the file cut off?") from error
            if not isinstance(row, dict):
                raise ValueError(
                    f"line {number}: expected an object with the columns as keys, found a {type(row).__name__}"
                )
            rows.append(row)
    return pd.DataFrame(rows, dtype=object)


MAX_UNSCORED = 0.01
