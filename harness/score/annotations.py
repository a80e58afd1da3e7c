"""Annotations made by AlpacaEval, one file per run -> scores in long form: `win_rate` and a length-controlled one.

Win rates are compared only where they were measured against the same answers to the same instructions by one judge.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple, NotRequired, TypedDict

import numpy as np
import pandas as pd

from harness.data.reasoning import part
from harness.data.records import prompt_id
from harness.score.alpaca_files import Gamed, controlled_name, leaderboard_warning, read_difficulty, read_gamed
from harness.score.length_control import MIN_PREFERENCES, length_controlled
from harness.study.errors import UsageError
from harness.study.files import Json
from harness.study.text import one_line

GIVEN_CONFIG = "given"  # of runs that were made elsewhere
MAX_MISSING = 0.1  # share of the instructions that are in one file alone; of more, they are other instructions
_NO_ROW = "the file has no row for this instruction"
_TEXTS = ("instruction", "output_1", "output_2", "generator_1", "generator_2", "annotator")
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


class AlpacaFiles(NamedTuple):
    """AlpacaEval's files, where they are given: the difficulty of all instructions in order, and the gamed baselines.

    Attributes:
        difficulty: (num_instructions,) or None.
        gamed: needs `difficulty` beside it.
        name: of the file of difficulties, for messages.
    """

    difficulty: np.ndarray | None = None
    gamed: Gamed | None = None
    name: str = ""

    @property
    def scorer(self) -> str:
        """Name of the length-controlled scores."""
        return controlled_name(has_difficulty=self.difficulty is not None, has_gamed=self.gamed is not None)


def read_alpaca_files(difficulty: str | None, gamed: str | None) -> AlpacaFiles:
    """Read the files that are given.

    Raises:
        UsageError: for gamed baselines without a difficulty, and for files that are not usable.
    """
    if difficulty is None:
        if gamed is not None:
            raise UsageError(f"--gamed={gamed}: needs --difficulty beside it: AlpacaEval's fit contains both")
        return AlpacaFiles()
    found = read_gamed(gamed, "--gamed") if gamed is not None else None
    return AlpacaFiles(read_difficulty(difficulty, "--difficulty"), found, f"--difficulty={difficulty}")


def annotation_scores(
    runs: Mapping[RunKey, Sequence[Annotation]],
    files: AlpacaFiles | None = None,
    sources: Mapping[RunKey, Path] | None = None,
) -> pd.DataFrame:
    """Return scores in long form from the annotations of each run: `win_rate` and a length-controlled one.

    The latter is `length_controlled` with both of AlpacaEval's files, and `length_controlled_minimal` without. An
    instruction that a run lacks is unscored. So are all length-controlled scores of fewer than three preferences.

    Args:
        runs: annotations by arm and seed.
        files: AlpacaEval's files; None for none.
        sources: the file of each run, for the verdict.

    Raises:
        UsageError: the difficulty is of another number of instructions, or their order is not known.
    """
    files = files or AlpacaFiles()
    asked, is_certain = _all_asked(runs)
    difficulty = _placed(files, asked, runs, is_certain=is_certain)
    frames = []
    for (arm, seed), rows in runs.items():
        run = _Laid(
            arm, seed, asked, dict(zip(_asked(rows), rows, strict=True)), str((sources or {}).get((arm, seed), ""))
        )
        frames.append(run.frame("win_rate", run.wins, _NO_PREFERENCE, []))
        values, reason, problems = _controlled(run, difficulty, files)
        frames.append(run.frame(files.scorer, values, reason, problems))
    return pd.concat(frames, ignore_index=True)


def _controlled(run: _Laid, difficulty: np.ndarray | None, files: AlpacaFiles) -> tuple[np.ndarray, str, list[str]]:
    """Return jackknife values (num_instructions,), the reason where there is none, and the fit's problems."""
    wins, values = run.wins, np.full(len(run.asked), math.nan)
    known = ~np.isnan(wins)
    problem = leaderboard_warning(has_difficulty=files.difficulty is not None, has_gamed=files.gamed is not None)
    problems = [problem] if problem else []
    if known.sum() < MIN_PREFERENCES:
        return values, _TOO_FEW, problems
    given = None if difficulty is None else difficulty[known]
    fitted = length_controlled(wins[known], run.differences[known], difficulty=given, gamed=files.gamed)
    values[known] = fitted.pseudo_values
    return values, _NO_PREFERENCE, [*problems, *fitted.problems()]


Asked = tuple[str, int]  # an instruction, and how often it stood in the file before


def _asked(rows: Sequence[Annotation]) -> list[Asked]:
    """Return the instructions in order; AlpacaEval has a few twice: each is a prompt of its own."""
    before: Counter[str] = Counter()
    found = []
    for row in rows:
        found.append((row["instruction"], before[row["instruction"]]))
        before[row["instruction"]] += 1
    return found


def _all_asked(runs: Mapping[RunKey, Sequence[Annotation]]) -> tuple[list[Asked], bool]:
    """Return the instructions of all runs in an order that all files follow, and whether it is the only one."""
    sorter: TopologicalSorter[Asked] = TopologicalSorter()
    for rows in runs.values():
        keys = _asked(rows)
        for place, one in enumerate(keys):
            sorter.add(one, *keys[max(0, place - 1) : place])
    found: list[Asked] = []
    is_certain = True
    try:
        sorter.prepare()
    except CycleError as error:
        raise UsageError(
            "the instructions of the files stand in different orders; sort the rows of all alike"
        ) from error
    while sorter.is_active():
        ready = sorter.get_ready()
        is_certain = is_certain and len(ready) == 1
        found += ready
        sorter.done(*ready)
    return found, is_certain


def _placed(
    files: AlpacaFiles, asked: Sequence[Asked], runs: Mapping[RunKey, Sequence[Annotation]], *, is_certain: bool
) -> np.ndarray | None:
    """Return the difficulty of each instruction: AlpacaEval's file knows it by its place alone."""
    if files.difficulty is None:
        return None
    if len(files.difficulty) != len(asked) or not is_certain:
        counts = ", ".join(f"{run_name(key)} {len(rows)}" for key, rows in runs.items())
        order = "" if is_certain else ", in an order that they do not settle"
        raise UsageError(
            f"{files.name}: {len(files.difficulty)} numbers, and the runs hold {len(asked)} instructions{order} (rows: "
            f"{counts}); each number belongs to an instruction by its place, so one of the files must hold all "
            f"{len(files.difficulty)}: give a complete file among the runs, or write the rows without an annotation "
            'into one of them in their place, with "preference": null'
        )
    return files.difficulty


def read_all_annotations(runs: Mapping[RunKey, Path]) -> dict[RunKey, list[Annotation]]:
    """Return the annotations of all runs.

    Raises:
        UsageError: see `read_annotations`; and where the runs were not compared with the same answers to the same
            instructions by the same judge. Up to a tenth of the instructions may lack in a file.
    """
    rows = {key: read_annotations(path) for key, path in runs.items()}
    (first, known), *others = rows.items()
    for key, found in others:
        if difference := _other_measurement(known, found):
            raise UsageError(
                f"{run_name(first)}={runs[first]} and {run_name(key)}={runs[key]}: {difference}; win rates can be "
                "compared where one judge has compared all runs with the same answers to the same instructions; "
                "annotate them alike"
            )
    return rows


def run_name(key: RunKey) -> str:
    """Return a run's name on the command line."""
    return f"{key[0]}:{key[1]}"


def _other_measurement(rows: Sequence[Annotation], others: Sequence[Annotation]) -> str | None:
    """Say in what two runs were measured differently; None where they were measured alike."""
    asked, also_asked = (dict(zip(_asked(one), one, strict=True)) for one in (rows, others))
    alone = [*(key for key in asked if key not in also_asked), *(key for key in also_asked if key not in asked)]
    if len(alone) > MAX_MISSING * len({*asked, *also_asked}):
        return (
            f"their instructions differ ({len(asked)} and {len(also_asked)} rows; in one alone: {len(alone)}, such as "
            f"{one_line(str(alone[0][0]), 60)!r}; allowed: {MAX_MISSING:.0%} of all)"
        )
    shared = [key for key in asked if key in also_asked]
    if shared != [key for key in also_asked if key in asked]:
        return "their instructions stand in another order; sort the rows of both alike"
    differing = sum(asked[key]["output_1"] != also_asked[key]["output_1"] for key in shared)
    name, other_name = (str(one[0].get("generator_1", "not named")) for one in (rows, others))
    if differing:
        return (
            f"their baselines differ: output_1 is of {one_line(name, 40)} and of {one_line(other_name, 40)}, with "
            f"other texts in {differing} of {len(shared)} rows (output_1 is the baseline's answer, "
            "output_2 the model's)"
        )
    judge, other_judge = (str(one[0].get("annotator", "not named")) for one in (rows, others))
    if judge != other_judge:
        return f"their judges differ: the annotator is {one_line(judge, 60)} and {one_line(other_judge, 60)}"
    return None


def measurement_notes(runs: Mapping[RunKey, Sequence[Annotation]]) -> Iterator[str]:
    """Name the runs that lack instructions, and a baseline of several names."""
    total = len(_all_asked(runs)[0])
    for key, rows in runs.items():
        if len(rows) < total:
            yield f"{run_name(key)}: no row for {total - len(rows)} of {total} instructions; they are unscored"
    names = dict.fromkeys(one_line(str(rows[0].get("generator_1", "not named")), 40) for rows in runs.values())
    if len(names) > 1:
        yield f"the baseline has the names {', '.join(names)}; its answers are the same texts"


def thinking_notes(runs: Mapping[RunKey, Sequence[Annotation]]) -> Iterator[str]:
    """Name the runs whose annotated answers hold thinking, which the judge has read and lengths leave out."""
    for key, rows in runs.items():
        count = sum(bool(part(row["output_2"] or "").spans) for row in rows)
        if count:
            yield (
                f"{run_name(key)}: {count} of {len(rows)} answers hold thinking; lengths leave it out, but "
                "what the judge has read is not known here"
            )


def read_annotations(path: Path) -> list[Annotation]:
    """Return the annotations of one model.

    Raises:
        UsageError: for a file that is not of AlpacaEval's form, of several models, or a preference out of range.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not readable as JSON ({error}); give AlpacaEval's annotations.json") from error
    needed = {"instruction", "output_1", "output_2", "preference"}
    is_list = isinstance(rows, list) and bool(rows)
    if not is_list or not all(isinstance(row, dict) and needed <= row.keys() for row in rows):
        raise UsageError(f"{path}: not AlpacaEval's annotations: a list of objects with {', '.join(sorted(needed))}")
    for number, row in enumerate(rows, start=1):
        _check_annotation(path, number, row)
    for column, what in (("generator_2", "model"), ("generator_1", "baseline"), ("annotator", "judge")):
        names = {str(row.get(column, "")) for row in rows}
        if len(names) > 1:
            listed = one_line(", ".join(sorted(names)), 200)
            raise UsageError(f"{path}: annotations of several {what}s ({column}: {listed}); give one file per {what}")
    _check_scale(path, [row["preference"] for row in rows])
    return rows


def _check_annotation(path: Path, number: int, row: Mapping[str, Json]) -> None:
    value = row["preference"]
    if value is not None and not _is_preference(value):
        raise UsageError(
            f"{path}: annotation {number}: preference {one_line(repr(value), 60)}; allowed: 1 to 2, "
            "0 for a draw, null for none"
        )
    for column in _TEXTS:
        if row.get(column) is not None and not isinstance(row[column], str):
            kind, value = type(row[column]).__name__, one_line(repr(row[column]), 60)
            raise UsageError(f"{path}: annotation {number}: {column} is of type {kind}; allowed: text; found: {value}")


def _is_preference(value: Json) -> bool:
    """Return whether a value is a preference, or NaN, which stands for none."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return value == 0 or 1 <= value <= 2 or (isinstance(value, float) and math.isnan(value))


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
    return _wins([row["preference"] for row in rows])


def _wins(values: Sequence[float | None]) -> np.ndarray:
    coded = np.array([math.nan if value is None else float(value) for value in values])
    return np.where(coded == 0, 0.5, coded - 1)


def differences(rows: Sequence[Annotation]) -> np.ndarray:
    """Return the model's characters minus the baseline's, shape (num_rows,)."""
    return np.array([float(_length(row["output_2"]) - _length(row["output_1"])) for row in rows])


def _length(output: str | None) -> int:
    """Return the characters of an answer without its thinking."""
    return len(part(output or "").answer)


def note_column(notes: Sequence[str], count: int) -> list[str]:
    """Return the column `note` of a run's rows of one scorer: a note a row, from the first row on."""
    room = max(count - 1, 0)
    shown = [*notes[:room], "; ".join(notes[room:])]
    return [*shown, *[""] * (count - len(shown))]


class _Laid(NamedTuple):
    """The annotations of one run, laid out by the instructions of all runs."""

    arm: str
    seed: int
    asked: Sequence[Asked]
    rows: Mapping[Asked, Annotation]
    source: str

    @property
    def wins(self) -> np.ndarray:
        """Preferences in [0, 1], shape (num_instructions,); NaN where there is none."""
        return _wins([self.rows[key]["preference"] if key in self.rows else None for key in self.asked])

    @property
    def differences(self) -> np.ndarray:
        """The model's characters minus the baseline's, shape (num_instructions,); 0 where there is no row."""
        found = np.zeros(len(self.asked))
        places = [place for place, key in enumerate(self.asked) if key in self.rows]
        found[places] = differences([self.rows[self.asked[place]] for place in places])
        return found

    def frame(self, scorer: str, scores: np.ndarray, reason: str, notes: Sequence[str]) -> pd.DataFrame:
        """Return the rows of one scorer, with notes about it."""
        reasons = [reason if key in self.rows else _NO_ROW for key in self.asked]
        names = [prompt_id([{"role": "user", "content": text}]) for text, _ in self.asked]
        columns = {
            "arm": self.arm,
            "config": GIVEN_CONFIG,
            "seed": self.seed,
            "split": "golden",
            "prompt_id": [
                f"{name}#{again}" if again else name for name, (_, again) in zip(names, self.asked, strict=True)
            ],
            "scorer": scorer,
            "score": scores,
            "cluster": names,
            "tokens": None,
            "chars": pd.Series(
                [_length(self.rows[key]["output_2"]) if key in self.rows else None for key in self.asked], dtype=object
            ),
            "unscored_reason": [why if math.isnan(score) else "" for why, score in zip(reasons, scores, strict=True)],
            "stage": "confirm",
            "flag": "",
            "source": self.source,
            "note": note_column(notes, len(self.asked)),
        }
        return pd.DataFrame(columns)
