"""Scores of a scorer of one's own -> the same as plain values, or a `UsageError` that names scorer, prompt and value.

A score that the decision could not use is refused where it is made: later it would stand in the way of every metric.
"""

from __future__ import annotations

import math
import numbers
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from harness.score.answers import Key, Run, Score, TrialOutputs
from harness.study.errors import UsageError
from harness.study.files import Json, mapping, read_json, write_json
from harness.study.text import one_line

FACTS = "own_scorers.json"
_HINT = "return one harness.scorers.Score for each prompt, with score=None and an unscored_reason where there is none"


def check_scores(
    path: str, run: Run, found: Sequence[Score], outputs: TrialOutputs, splits: Sequence[str]
) -> list[Score]:
    """Check a scorer's scores of one run.

    Args:
        path: the scorer's file, for messages.
        run: the run.
        found: what the scorer returned.
        outputs: what it was given; unchanged.
        splits: the splits that are scored: each answered prompt of them needs exactly one score.

    Returns:
        The scores, as floats in [0, 1] or None with a reason.

    Raises:
        UsageError: at the first score that is not usable, and for prompts without one.
    """
    known: set[Key] = {(row["split"], row["prompt_id"]) for row in outputs.prompts}
    scores = [_plain(one, f"{path}: {run.title}") for one in found]
    counts = Counter((one.split, one.prompt_id) for one in scores)
    for key, count in counts.items():
        where = f"{path}: {run.title}, {_shown(key[0])} prompt {_shown(key[1])}"
        if key not in known:
            raise UsageError(f"{where}: no prompt of this study; allowed: split and prompt_id of outputs.prompts")
        if count > 1:
            raise UsageError(f"{where}: {count} scores; {_HINT}")
    answered = [(row["split"], row["prompt_id"]) for row in outputs.completions if row["split"] in splits]
    lacking = [key for key in answered if key not in counts]
    if lacking:
        raise UsageError(
            f"{path}: {run.title}: no score for {len(lacking)} of {len(answered)} prompts (first: {lacking[0][0]} "
            f"prompt {lacking[0][1]}); {_HINT}"
        )
    return scores


def _plain(one: Score, scorer: str) -> Score:
    """Return a score as plain values."""
    where = f"{scorer}, prompt {_shown(one.prompt_id)}"
    for name, text in (("split", one.split), ("prompt_id", one.prompt_id), ("unscored_reason", one.unscored_reason)):
        if not isinstance(text, str):
            raise UsageError(f"{where}: {name} is {_shown(text)}; allowed: text")
    reason = one.unscored_reason.strip()
    if one.score is None:
        if not reason:
            raise UsageError(f"{where}: score None without an unscored_reason; say why there is none")
        return Score(one.split, one.prompt_id, None, reason)
    value = _number(one.score)
    if value is None or not 0 <= value <= 1:
        raise UsageError(
            f"{where}: score {_shown(one.score)}; allowed: a number from 0 to 1, higher is better, or None"
        )
    if reason:
        raise UsageError(f"{where}: score {value:g} and an unscored_reason ({_shown(reason)}); leave one of them out")
    return Score(one.split, one.prompt_id, value)


def _number(value: Json | np.bool_) -> float | None:
    """Return a finite number, a NumPy one too; true and false are 1 and 0."""
    if isinstance(value, np.bool_):
        return float(bool(value))
    if not isinstance(value, numbers.Real):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _shown(value: Json) -> str:
    try:
        return one_line(value if isinstance(value, str) else repr(value), 60)
    except Exception as error:  # a class of the scorer's own, whose repr may do anything
        return f"a {type(value).__name__} ({type(error).__name__})"


def note_failures(study: Path, ran: Sequence[str], failed: Mapping[str, str]) -> None:
    """Keep for the verdict which scorers of one's own have failed; one that works again is forgotten.

    Args:
        study: its folder.
        ran: the names of the scorers of one's own that have run.
        failed: why one of them has no scores, by name.
    """
    path = study / FACTS
    old = mapping(read_json(path).get("failed")) if path.is_file() else {}
    found = {str(name): str(text) for name, text in old.items() if name not in ran} | dict(failed)
    if found or path.is_file():
        warnings = [f"scorer {name}: {text}; its scores are left out" for name, text in found.items()]
        write_json(path, {"failed": found, "warnings": warnings})
