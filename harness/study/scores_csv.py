"""scores.csv, all scores of a study in long form: one writer, one reader; and scores files of other tools.

Text is written so that a spreadsheet program does not take it for a formula, and is read back unchanged: a cell that
begins with one of `= + - @`, tab or carriage return gets an apostrophe before it, as OWASP advises ("CSV Injection").
So does a text that begins with an apostrophe, where it could be mistaken for such a cell.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd

from harness.study.files import write_text
from harness.study.rows import ScoreRow

SCORES_FILE = "scores.csv"
SCORE_COLUMNS = tuple(ScoreRow.__annotations__)
MAX_UNSCORED = 0.01  # share of a run's prompts: a scorer that leaves more of them unscored has failed

_STARTS = re.compile(r"'*[=+\-@\t\r]")
_ESCAPED = re.compile(r"'+[=+\-@\t\r]")

Cell = TypeVar("Cell")


def write_scores(path: Path, rows: Iterable[Mapping[str, Any]] | pd.DataFrame) -> None:
    """Write scores in long form as CSV.

    Args:
        path: scores.csv of a study, or a file for `harness.decide`.
        rows: `ScoreRow`s, or a table with the columns `SCORE_COLUMNS`.
    """
    write_text(path, to_csv(score_table(rows)))


def score_table(rows: Iterable[Mapping[str, Any]] | pd.DataFrame) -> pd.DataFrame:
    """Return scores as a table with the columns `SCORE_COLUMNS`, one row per score."""
    if isinstance(rows, pd.DataFrame):
        return rows.reindex(columns=list(SCORE_COLUMNS))
    return pd.DataFrame(list(rows), columns=list(SCORE_COLUMNS))


def to_csv(table: pd.DataFrame) -> str:
    """Return a table as CSV; numbers stay numbers, text is harmless."""
    safe = table.map(_escaped)
    # Python's writer leaves a lone carriage return unquoted, and its reader ends the line there.
    lone = safe.map(lambda value: isinstance(value, str) and "\r" in value).any(axis=None)
    return safe.to_csv(index=False, quoting=csv.QUOTE_NONNUMERIC if lone else csv.QUOTE_MINIMAL)


def _escaped(value: Cell) -> Cell | str:
    return f"'{value}" if isinstance(value, str) and _STARTS.match(value) else value


def _unescaped(cell: str) -> str:
    return cell[1:] if _ESCAPED.match(cell) else cell


def read_scores_csv(path: Path) -> pd.DataFrame:
    """Read a CSV file with a header; every field is text, and an empty one is an empty text.

    Not pandas' reader: it takes the fields that a truncated line lacks, and names such as `NA`, for missing values.

    Raises:
        OSError: where the file cannot be read.
        ValueError: for a file without a line, and with its number for a line that is cut off or has another number of
            fields than the header.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:
        return _parsed_csv(file)


def written_and_read(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table as `read_scores_csv` reads it after `write_scores`: for comparison with a stored file."""
    return _parsed_csv(io.StringIO(to_csv(table), newline=""))


def _parsed_csv(file: Iterable[str]) -> pd.DataFrame:
    rows: list[list[str]] = []
    lines = csv.reader(file, strict=True)
    try:
        for row in filter(None, lines):
            if rows and len(row) != len(rows[0]):
                raise ValueError(
                    f"line {lines.line_num} has {len(row)} fields, the header {len(rows[0])}: "
                    "the file was cut off, or a field with a comma is not quoted; write it again"
                )
            rows.append([_unescaped(field) for field in row])
    except csv.Error as error:
        raise ValueError(f"line {lines.line_num}: {error}; was the file cut off?") from error
    if not rows:
        raise ValueError("the file is empty")
    twice = [name for name in rows[0] if rows[0].count(name) > 1]
    if twice:
        raise ValueError(f"column {twice[0]} stands twice")
    return pd.DataFrame(rows[1:], columns=rows[0], dtype=object)


def read_scores_jsonl(path: Path) -> pd.DataFrame:
    """Read one JSON object per line; values keep their JSON types, and a key that a line lacks is missing.

    Not pandas' reader: it makes the number 7 of the text "007".

    Raises:
        OSError: where the file cannot be read.
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
