"""What scores say beside the numbers: the runs' files, notes about a scorer, and scorers that are left out.

Input: scores in long form with the optional columns `source` and `note` -> `sources` and warnings for the verdict.
"""

from __future__ import annotations

from collections.abc import Collection

import pandas as pd

from harness.config.arms import title
from harness.decide.scores_file import DEFAULTS, as_names, checked
from harness.study.decision import Verdict
from harness.study.errors import UsageError
from harness.study.text import one_line

_SHOWN = 400  # characters of a note


def add_notes(scores: pd.DataFrame, result: Verdict) -> None:
    """Add to a verdict what its scores say beside it: the runs' files, and notes."""
    if sources := run_sources(scores, result):
        result["sources"] = sources
    result["warnings"] += note_warnings(scores, result)


def source_lines(result: Verdict) -> list[str]:
    """Return one line per arm for a terminal: which file was which run."""
    return [
        f"{title(arm)}: " + ", ".join(f"{one_line(seed, 20)}={one_line(path, 200)}" for seed, path in files.items())
        for arm, files in result.get("sources", {}).items()
    ]


def without_bad_scorers(scores: pd.DataFrame, needed: Collection[str]) -> tuple[pd.DataFrame, list[str]]:
    """Leave out the scorers with a row that the rule refuses, but for those that the verdict needs.

    Args:
        scores: in long form.
        needed: the metric, and the guards.

    Returns:
        The other rows, and one warning per scorer that is left out.
    """
    if "scorer" not in scores:
        return scores, []
    names = as_names(scores["scorer"], blank=DEFAULTS["scorer"])
    warnings, kept = [], pd.Series(True, index=scores.index)
    for name in dict.fromkeys(names):
        if name in needed:
            continue
        try:
            checked(scores[names == name])
        except UsageError as error:
            warnings.append(f"scorer {one_line(name, 60)} is left out of scores: {str(error).removeprefix('scores: ')}")
            kept &= names != name
    if not warnings:
        return scores, []
    found = scores[kept].reset_index(drop=True)
    numbers = pd.to_numeric(found["score"], errors="coerce")
    is_whole = (numbers.notna() | found["score"].isna() | (found["score"].astype("object") == "")).all()
    return (found.assign(score=numbers) if is_whole else found), warnings


def run_sources(scores: pd.DataFrame, result: Verdict) -> dict[str, dict[str, str]]:
    """Return the files of the deciding runs by arm and seed; empty where the scores name none."""
    rows = _deciding(scores, result, "source")
    found: dict[str, dict[str, str]] = {}
    for arm, seed, source in rows.drop_duplicates(["arm", "seed"]).itertuples(index=False, name=None):
        found.setdefault(arm, {})[seed] = source
    return found


def note_warnings(scores: pd.DataFrame, result: Verdict) -> list[str]:
    """Return the notes about the deciding metric, each once with the runs that it is about."""
    rows = _deciding(scores, result, "note")
    found = []
    for note, runs in rows.groupby("note", sort=False):
        names = ", ".join(dict.fromkeys(f"{arm} {seed}" for arm, seed in zip(runs["arm"], runs["seed"], strict=True)))
        found.append(f"{result['metric']} ({names}): {one_line(str(note), _SHOWN)}")
    return found


def _deciding(scores: pd.DataFrame, result: Verdict, column: str) -> pd.DataFrame:
    """Return arm, seed and a column of the deciding rows in which the column holds a text."""
    if column not in scores or "scorer" not in scores:
        return pd.DataFrame(columns=["arm", "seed", column])
    names = pd.DataFrame({name: as_names(scores[name]) for name in ("arm", "seed", "scorer", column)})
    chosen = (names["scorer"] == result["metric"]) & names["arm"].isin(result["arms"]) & (names[column] != "")
    return names.loc[chosen, ["arm", "seed", column]]
