"""AlpacaEval's annotations.json, made elsewhere, as scores: raw and length-controlled win rates, a row a prompt.

A preference is 1 where the baseline (`output_1`) wins and 2 where the model (`output_2`) does, 1.5 or 0 for a draw, and
anything between for a weighted judge; the win rate is the mean of preference - 1 (AlpacaEval's definition).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from harness.lengthcontrol import length_controlled
from harness.records import SCORE_COLUMNS, UsageError, prompt_id

RAW, CONTROLLED = "win_rate", "length_controlled"


def read_annotations(path: Path) -> list[dict[str, Any]]:
    """Return the annotations of one model.

    Raises:
        UsageError: for a file that is not of AlpacaEval's form, of several models, or a preference out of range.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: not readable as JSON ({error}); give AlpacaEval's annotations.json") from error
    needed = {"instruction", "output_1", "output_2", "preference"}
    if (
        not isinstance(rows, list)
        or not rows
        or not all(isinstance(row, dict) and needed <= row.keys() for row in rows)
    ):
        raise UsageError(f"{path}: not AlpacaEval's annotations: a list of objects with {', '.join(sorted(needed))}")
    models = {str(row.get("generator_2", "")) for row in rows}
    if len(models) > 1:
        raise UsageError(f"{path}: annotations of several models ({', '.join(sorted(models))}); give one file a model")
    for number, row in enumerate(rows, start=1):
        value = row["preference"]
        if value is not None and not (
            isinstance(value, int | float) and (value == 0 or 1 <= value <= 2 or math.isnan(value))
        ):
            raise UsageError(f"{path}: annotation {number}: preference {value!r}; allowed: 1 to 2, or 0 for a draw")
    return rows


def preferences(rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Return the model's preferences in [0, 1], shape (num_rows,); NaN where the judge gave none."""
    coded = np.array([math.nan if row["preference"] is None else float(row["preference"]) for row in rows])
    return np.where(coded == 0, 0.5, coded - 1)


def differences(rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Return the model's characters minus the baseline's, shape (num_rows,)."""
    return np.array([float(len(row["output_2"] or "") - len(row["output_1"] or "")) for row in rows])


def annotation_scores(runs: Mapping[tuple[str, int], Path]) -> pd.DataFrame:
    """Return scores in long form of several models' annotations, by (arm, seed): `win_rate` and `length_controlled`.

    The length-controlled ones leave out the instruction difficulty, which AlpacaEval publishes on the Hub alone.
    """
    frames = []
    for (arm, seed), path in runs.items():
        rows = read_annotations(path)
        given, lengths = preferences(rows), differences(rows)
        known = ~np.isnan(given)
        values = np.full(len(rows), math.nan)
        values[known] = length_controlled(given[known], lengths[known]).pseudo_values
        for scorer, scores in ((RAW, given), (CONTROLLED, values)):
            frames.append(_frame(arm, seed, rows, scorer, scores))
    return pd.concat(frames, ignore_index=True)


def _frame(arm: str, seed: int, rows: Sequence[Mapping[str, Any]], scorer: str, scores: np.ndarray) -> pd.DataFrame:
    ids = [prompt_id([{"role": "user", "content": str(row["instruction"])}]) for row in rows]
    frame = pd.DataFrame({"prompt_id": ids, "score": scores, "chars": [len(row["output_2"] or "") for row in rows]})
    # AlpacaEval asks a few instructions twice: each time is a prompt of its own.
    again = frame.groupby("prompt_id").cumcount()
    frame["cluster"] = frame["prompt_id"]
    frame["prompt_id"] = frame["prompt_id"].where(again == 0, frame["prompt_id"] + "#" + again.astype(str))
    frame["unscored_reason"] = np.where(frame["score"].isna(), "the judge gave no preference", "")
    fixed: dict[str, Any] = {
        "arm": arm,
        "config": "given",
        "seed": seed,
        "split": "golden",
        "scorer": scorer,
        "stage": "confirm",
    }
    return frame.assign(**fixed, flag="", tokens=None).reindex(columns=list(SCORE_COLUMNS))
