"""Read the rows of a scores file as they stand: text stays text, and a file that was cut off is an error."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pandas as pd

from harness.spreadsheet import original


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
