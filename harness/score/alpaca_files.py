"""AlpacaEval's own files: instruction_difficulty.csv and df_gamed.csv -> arrays, and the name of the fit they allow.

With both files the length-controlled fit is AlpacaEval's `length_controlled_v1`; without, it has another name.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from harness.study.errors import UsageError
from harness.study.text import one_line

FULL, WITHOUT_GAMED, MINIMAL = "length_controlled", "length_controlled_noreg", "length_controlled_minimal"
NOT_THE_LEADERBOARDS = (
    "not AlpacaEval's length-controlled win rate, and not to be set beside leaderboard values: its fit lacks {lacking} "
    "(measured on 22 models of the leaderboard: {off})"
)
_DIFFICULTY, _PREFERENCE, _LENGTH = "instruction_difficulty", "preference", "std_delta_len"


@dataclass(frozen=True)
class Gamed:
    """Comparisons of gamed baselines (longer or shorter on purpose) with the baseline, as AlpacaEval 2 adds them.

    Attributes:
        preferences: (num_rows,) in [0, 1], 1 where the gamed answer wins.
        differences: (num_rows,) characters of the gamed answer minus the baseline's, over their standard deviation.
        difficulty: (num_rows,) of the instruction.
    """

    preferences: np.ndarray
    differences: np.ndarray
    difficulty: np.ndarray


def controlled_name(*, has_difficulty: bool, has_gamed: bool) -> str:
    """Return the name of the scores of a length-controlled fit, as AlpacaEval calls its variants."""
    if not has_difficulty:
        return MINIMAL
    return FULL if has_gamed else WITHOUT_GAMED


def leaderboard_warning(*, has_difficulty: bool, has_gamed: bool) -> str | None:
    """Say that these scores are not the leaderboard's; None where they are."""
    if has_difficulty and has_gamed:
        return None
    if has_difficulty:
        return NOT_THE_LEADERBOARDS.format(lacking="the gamed baselines", off="0.8 points off on average, 2.2 at most")
    return NOT_THE_LEADERBOARDS.format(
        lacking="the instruction difficulty and the gamed baselines", off="5 points off on average, 16 at most"
    )


def read_difficulty(path: str, key: str) -> np.ndarray:
    """Read AlpacaEval's instruction_difficulty.csv: one number an instruction, in the order of the golden set.

    Args:
        path: a CSV with the column `instruction_difficulty`, or with the numbers in its last column. A first column of
            the places 0, 1, 2, ... orders the rows.
        key: the option or config key that names the file, for messages.

    Returns:
        Shape (num_instructions,).

    Raises:
        UsageError: an unreadable file, or a value that is no number, with its row.
    """
    columns, rows = _read(path, key, ())
    value = _DIFFICULTY if _DIFFICULTY in columns else columns[-1]
    numbers = np.array([_number(path, key, number, value, row[value]) for number, row in enumerate(rows, start=1)])
    if columns[0] == value:
        return numbers
    places = [row[columns[0]] or "" for row in rows]
    wanted = [str(place) for place in range(len(rows))]
    if sorted(places) != sorted(wanted):
        raise UsageError(
            f"{key}={path}: column {columns[0] or 'without a name'!r} does not hold the places 0 to {len(rows) - 1}, "
            "each once; give AlpacaEval's instruction_difficulty.csv, or the column instruction_difficulty alone"
        )
    return numbers[[places.index(place) for place in wanted]]


def read_gamed(path: str, key: str) -> Gamed:
    """Read AlpacaEval's df_gamed.csv; its lengths are the baseline's minus the gamed answer's.

    Args:
        path: a CSV with the columns `preference` (0 to 1; rows without one are left out), `std_delta_len` and
            `instruction_difficulty`.
        key: the option or config key that names the file, for messages.

    Raises:
        UsageError: an unreadable file, or a value that is not allowed, with its row.
    """
    _, rows = _read(path, key, (_PREFERENCE, _LENGTH, _DIFFICULTY))
    found = []
    for number, row in enumerate(rows, start=1):
        if (row[_PREFERENCE] or "").strip().lower() in ("", "nan"):
            continue
        preference, length, difficulty = (_number(path, key, number, name, row[name]) for name in row)
        if not 0 <= preference <= 1:
            raise UsageError(f"{key}={path}: row {number}: {_PREFERENCE} {preference:g}; allowed: 0 to 1")
        found.append((preference, -length, difficulty))
    if not found:
        raise UsageError(f"{key}={path}: no row has a {_PREFERENCE}; give AlpacaEval's df_gamed.csv")
    return Gamed(*np.array(found).T)


def _read(path: str, key: str, needed: Sequence[str]) -> tuple[list[str], list[dict[str, str | None]]]:
    """Return the names of a CSV's columns, and its rows: of the needed columns where some are named."""
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            columns = list(reader.fieldnames or ())
            rows = list(reader)
    except (OSError, UnicodeError, csv.Error) as error:
        raise UsageError(f"{key}={path}: not readable as CSV ({error})") from error
    lacking = [name for name in needed if name not in columns]
    if lacking or not rows:
        what = f"column {', '.join(lacking)} is missing" if lacking else "no rows"
        wanted = ", ".join(needed) or "one number per row, under a heading"
        raise UsageError(f"{key}={path}: {what}; needed: {wanted}; found: {one_line(', '.join(columns), 200)}")
    return columns, [{name: row[name] for name in needed or columns} for row in rows]


def _number(path: str, key: str, row: int, field: str, text: str | None) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UsageError(f"{key}={path}: row {row}: {field} is {one_line(str(text), 40)!r}; allowed: a number")
    return value
