"""Annotations made by AlpacaEval, one file per run -> scores in long form: `win_rate` and `length_controlled`.

Win rates are compared only where they were measured against the same answers to the same instructions by one judge.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np
import pandas as pd

from harness.data.reasoning import part
from harness.data.records import prompt_id
from harness.score.length_control import MIN_PREFERENCES, length_controlled
from harness.study.errors import UsageError
from harness.study.text import one_line

GIVEN_CONFIG = "given"  # of runs that were made elsewhere
_NO_PREFERENCE, _TOO_FEW = "the judge gave no preference", "fewer than three preferences"

RunKey = tuple[str, int]  # arm, seed


class Annotation(TypedDict):
    """One row of AlpacaEval's annotations.json; preference: 1 (output_1 wins) to 2 (output_2 wins), 0 for a draw."""

    instruction: str
    output_1: str | None
    output_2: str | None
    preference: float | None
    generator_1: NotRequired[str]
    generator_2: NotRequired[str]
    annotator: NotRequired[str]


def annotation_scores(runs: Mapping[RunKey, Sequence[Annotation]]) -> pd.DataFrame:
    """Return scores in long form from the annotations of each run: `win_rate` and `length_controlled`.

    The length-controlled scores leave out the instruction difficulty, which AlpacaEval publishes on the Hub alone. With
    fewer than three preferences they are unscored.
    """
    frames = []
    for (arm, seed), rows in runs.items():
        wins = preferences(rows)
        known = ~np.isnan(wins)
        controlled, reason = np.full(len(rows), math.nan), _NO_PREFERENCE
        if known.sum() >= MIN_PREFERENCES:
            controlled[known] = length_controlled(wins[known], differences(rows)[known]).pseudo_values
        else:
            reason = _TOO_FEW
        frames.append(_score_frame(arm, seed, rows, "win_rate", wins, _NO_PREFERENCE))
        frames.append(_score_frame(arm, seed, rows, "length_controlled", controlled, reason))
    return pd.concat(frames, ignore_index=True)


def read_all_annotations(runs: Mapping[RunKey, Path]) -> dict[RunKey, list[Annotation]]:
    """Return the annotations of all runs.

    Raises:
        UsageError: see `read_annotations`; and where the runs were not compared with the same answers to the same
            instructions by the same judge.
    """
    rows = {key: read_annotations(path) for key, path in runs.items()}
    (first, known), *others = rows.items()
    for key, found in others:
        if difference := _other_measurement(known, found):
            raise UsageError(
                f"{_run_name(first)}={runs[first]} and {_run_name(key)}={runs[key]}: {difference}; win rates can be "
                "compared where one judge has compared all runs with the same answers to the same instructions; "
                "annotate them alike"
            )
    return rows


def _run_name(key: RunKey) -> str:
    return f"{key[0]}:{key[1]}"


def _other_measurement(rows: Sequence[Annotation], others: Sequence[Annotation]) -> str | None:
    """Say in what two runs were measured differently; None where they were measured alike."""
    asked, also_asked = ([row["instruction"] for row in one] for one in (rows, others))
    if Counter(asked) != Counter(also_asked):
        lacking = Counter(asked) - Counter(also_asked) or Counter(also_asked) - Counter(asked)
        return (
            f"their instructions differ ({len(asked)} and {len(also_asked)} rows; in one alone: "
            f"{one_line(next(iter(lacking)), 60)!r})"
        )
    if asked != also_asked:
        return "their instructions stand in another order; sort the rows of both alike"
    ours, theirs = ([row["output_1"] for row in one] for one in (rows, others))
    name, other_name = (str(one[0].get("generator_1", "not named")) for one in (rows, others))
    if ours != theirs:
        differing = sum(one != other for one, other in zip(ours, theirs, strict=True))
        return (
            f"their baselines differ: output_1 is of {one_line(name, 40)} and of {one_line(other_name, 40)}, with "
            f"other texts in {differing} of {len(ours)} rows (output_1 is the baseline's answer, output_2 the model's)"
        )
    judge, other_judge = (str(one[0].get("annotator", "not named")) for one in (rows, others))
    if judge != other_judge:
        return f"their judges differ: the annotator is {one_line(judge, 60)} and {one_line(other_judge, 60)}"
    return None


def thinking_notes(runs: Mapping[RunKey, Sequence[Annotation]]) -> Iterator[str]:
    """Name the runs whose annotated answers hold thinking, which the judge has read and lengths leave out."""
    for key, rows in runs.items():
        count = sum(bool(part(row["output_2"] or "").spans) for row in rows)
        if count:
            yield (
                f"{_run_name(key)}: {count} of {len(rows)} answers hold thinking; lengths leave it out, but "
                "what the judge has read is not known here"
            )


def read_annotations(path: Path) -> list[Annotation]:
    """Return the annotations of one model.

    Raises:
        UsageError: for a file that is not of AlpacaEval's form, of several models, or a preference out of range.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: not readable as JSON ({error}); give AlpacaEval's annotations.json") from error
    needed = {"instruction", "output_1", "output_2", "preference"}
    is_list = isinstance(rows, list) and bool(rows)
    if not is_list or not all(isinstance(row, dict) and needed <= row.keys() for row in rows):
        raise UsageError(f"{path}: not AlpacaEval's annotations: a list of objects with {', '.join(sorted(needed))}")
    for column, what in (("generator_2", "model"), ("generator_1", "baseline"), ("annotator", "judge")):
        names = {str(row.get(column, "")) for row in rows}
        if len(names) > 1:
            listed = ", ".join(sorted(names))
            raise UsageError(f"{path}: annotations of several {what}s ({column}: {listed}); give one file per {what}")
    for number, row in enumerate(rows, start=1):
        _check_annotation(path, number, row)
    _check_scale(path, [row["preference"] for row in rows])
    return rows


def _check_annotation(path: Path, number: int, row: Mapping[str, Any]) -> None:
    value = row["preference"]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is not None and not (is_number and (value == 0 or 1 <= value <= 2 or math.isnan(value))):
        raise UsageError(f"{path}: annotation {number}: preference {value!r}; allowed: 1 to 2, or 0 for a draw")
    for column in ("instruction", "output_1", "output_2"):
        if row[column] is not None and not isinstance(row[column], str):
            kind = type(row[column]).__name__
            raise UsageError(f"{path}: annotation {number}: {column} is of type {kind}; allowed: text")


def _check_scale(path: Path, values: Sequence[float | None]) -> None:
    """Refuse a file without a preference, and one that seems to code a loss as 0 and a win as 1."""
    known = [value for value in values if value is not None and not math.isnan(value)]
    if not known:
        raise UsageError(
            f"{path}: the judge gave no preference at all ({len(values)} rows); annotate the answers again"
        )
    if 0 in known and max(known) <= 1:
        raise UsageError(
            f"{path}: its preferences are 0 and 1 alone; here 1 is a win of output_1, 2 one of output_2, and 0 a draw; "
            "add 1 where 0 is a loss and 1 a win, or write 1.5 for a draw"
        )


def preferences(rows: Sequence[Annotation]) -> np.ndarray:
    """Return the model's preferences in [0, 1], shape (num_rows,); NaN where the judge gave none."""
    coded = np.array([math.nan if row["preference"] is None else float(row["preference"]) for row in rows])
    return np.where(coded == 0, 0.5, coded - 1)


def differences(rows: Sequence[Annotation]) -> np.ndarray:
    """Return the model's characters minus the baseline's, shape (num_rows,)."""
    return np.array([float(_length(row["output_2"]) - _length(row["output_1"])) for row in rows])


def _length(output: str | None) -> int:
    """Return the characters of an answer without its thinking."""
    return len(part(output or "").answer)


def _score_frame(
    arm: str, seed: int, rows: Sequence[Annotation], scorer: str, scores: np.ndarray, reason: str
) -> pd.DataFrame:
    ids = pd.Series([prompt_id([{"role": "user", "content": row["instruction"]}]) for row in rows])
    again = ids.groupby(ids).cumcount()  # AlpacaEval has a few instructions twice: each is a prompt of its own
    columns = {
        "arm": arm,
        "config": GIVEN_CONFIG,
        "seed": seed,
        "split": "golden",
        "prompt_id": ids.where(again == 0, ids + "#" + again.astype(str)),
        "scorer": scorer,
        "score": scores,
        "cluster": ids,
        "tokens": None,
        "chars": [_length(row["output_2"]) for row in rows],
        "unscored_reason": [reason if math.isnan(score) else "" for score in scores],
        "stage": "confirm",
        "flag": "",
    }
    return pd.DataFrame(columns)
