"""Judgments made by Arena-Hard, one `model_judgment` file per run -> scores in long form: `arena_hard`, one a prompt.

Each prompt is judged in two games: in the first one answer A is the baseline's, in the second one the model's. As in
arena-hard-auto (`show_result.py`) a strong verdict counts three times, and a prompt with a null game is left out. Other
than there, the games of a prompt become one score, so that the interval is over prompts and not over games.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, TypeAlias

import pandas as pd

from harness.score.annotations import GIVEN_CONFIG, MAX_MISSING, RunKey, note_column, run_name
from harness.study.errors import UsageError
from harness.study.files import Json
from harness.study.text import one_line

SCORER = "arena_hard"
STRONG = 3  # weight of a strong verdict
# For each label: the score of answer A, and the weight.
LABELS: Mapping[str, tuple[float, int]] = {
    "A>>B": (1.0, STRONG),
    "A>B": (1.0, 1),
    "A=B": (0.5, 1),
    "B=A": (0.5, 1),
    "B>A": (0.0, 1),
    "B>>A": (0.0, STRONG),
    "A<B": (0.0, 1),
    "A<<B": (0.0, STRONG),
    "B<A": (1.0, 1),
    "B<<A": (1.0, STRONG),
}
Row: TypeAlias = Mapping[str, Json]
_NULL = "a game has no verdict"
_NO_ROW = "the file has no judgment of this prompt"


class Judgment(NamedTuple):
    """The two games of a prompt, seen from the model.

    Attributes:
        total: sum of the weighted scores of the games; NaN where a game has no verdict.
        weight: sum of the weights.
    """

    total: float
    weight: int

    @property
    def score(self) -> float:
        """In [0, 1], 1 where the model wins both games; NaN where a game has no verdict."""
        return self.total / self.weight if self.weight else math.nan


class Judgments(NamedTuple):
    """One run's judgments by prompt, and what they were made with; these names are empty where a file has none."""

    by_prompt: Mapping[str, Judgment]
    baseline: str
    judge: str
    category: str

    @property
    def own_score(self) -> float:
        """Arena-Hard's score: the mean over weighted games, in [0, 1]."""
        known = [one for one in self.by_prompt.values() if one.weight]
        return sum(one.total for one in known) / sum(one.weight for one in known)


def read_all_judgments(runs: Mapping[RunKey, Path], category: str | None = None) -> dict[RunKey, Judgments]:
    """Return the judgments of all runs.

    Args:
        runs: files by arm and seed.
        category: keep this category alone; needed where a file holds several.

    Raises:
        UsageError: see `read_judgments`; and for runs of different judges, baselines or prompts.
    """
    found = {key: read_judgments(path, category) for key, path in runs.items()}
    (first, known), *others = found.items()
    for key, other in others:
        if difference := _other_measurement(known, other):
            raise UsageError(
                f"{run_name(first)}={runs[first]} and {run_name(key)}={runs[key]}: {difference}; scores can be "
                "compared where one judge has compared all runs with the same baseline on the same prompts"
            )
    return found


def _other_measurement(one: Judgments, other: Judgments) -> str | None:
    for what, ours, theirs in (
        ("categories", one.category, other.category),
        ("baselines", one.baseline, other.baseline),
        ("judges", one.judge, other.judge),
    ):
        if ours != theirs:
            named = " and ".join(one_line(name, 60) or "not named" for name in (ours, theirs))
            return f"their {what} differ: {named}"
    alone = one.by_prompt.keys() ^ other.by_prompt.keys()
    union = one.by_prompt.keys() | other.by_prompt.keys()
    if len(alone) > MAX_MISSING * len(union):
        return f"their prompts differ ({len(alone)} of {len(union)} are in one file alone; allowed: {MAX_MISSING:.0%})"
    return None


def read_judgments(path: Path, category: str | None = None) -> Judgments:
    """Return the judgments of one model: JSON lines of v0.1 (`question_id`) or v2.0 (`uid`, `category`, `baseline`).

    Raises:
        UsageError: a line that is no judgment, by its number; several categories without a choice; several models,
            judges or baselines; a prompt that is judged twice; no prompt with a verdict.
    """
    rows = _of_category(path, list(_rows(path)), category)
    for column, what in (("model", "model"), ("judge", "judge"), ("baseline", "baseline")):
        names = sorted({str(row.get(column) or "") for _, row in rows})
        if len(names) > 1:
            raise UsageError(
                f"{path}: judgments of several {what}s ({column}: {one_line(', '.join(names), 200)}); give one file "
                f"per {what}"
            )
    found: dict[str, Judgment] = {}
    for number, row in rows:
        name = str(row["uid"] if "uid" in row else row["question_id"])
        if name in found:
            raise UsageError(f"{path}: line {number}: a second judgment of the prompt {one_line(name, 60)}; keep one")
        found[name] = _judgment(f"{path}: line {number}", row["games"])
    if not any(one.weight for one in found.values()):
        raise UsageError(
            f"{path}: no prompt has a verdict in both games ({len(found)} prompts); judge the answers again"
        )
    row = rows[0][1]
    baseline, judge, kind = (str(row.get(name) or "") for name in ("baseline", "judge", "category"))
    return Judgments(found, baseline, judge, kind)


def _rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Yield the judgments of a file with their line numbers."""
    needed = "an object with uid (or question_id) and games"
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeError) as error:
        raise UsageError(f"{path}: not readable ({error}); give a file of Arena-Hard's model_judgment") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path}: line {number}: not JSON ({error}); needed: {needed}") from error
        if not isinstance(row, dict) or "games" not in row or not {"uid", "question_id"} & row.keys():
            raise UsageError(f"{path}: line {number}: not Arena-Hard's judgment; needed: {needed}")
        name = row.get("uid", row.get("question_id"))
        if not isinstance(name, str | int) or isinstance(name, bool) or name == "":
            raise UsageError(f"{path}: line {number}: the prompt's name is {one_line(repr(name), 60)}; allowed: text")
        yield number, row


def _of_category(path: Path, rows: list[tuple[int, Row]], category: str | None) -> list[tuple[int, Row]]:
    """Keep one category: each has a baseline of its own."""
    counts = Counter(str(row.get("category") or "") for _, row in rows)
    if not rows:
        raise UsageError(f"{path}: no judgments")
    listed = one_line(", ".join(f"{name or '(none)'} {count}" for name, count in sorted(counts.items())), 200)
    if category is None and len(counts) > 1:
        raise UsageError(
            f"{path}: judgments of {len(counts)} categories ({listed}); each has a baseline of its own, and they are "
            "not mixed; choose one: --category NAME"
        )
    if category is not None and category not in counts:
        raise UsageError(f"--category {one_line(category, 60)}: {path} holds none; found: {listed}")
    return rows if category is None else [(n, row) for n, row in rows if str(row.get("category") or "") == category]


def _judgment(where: str, games: Json) -> Judgment:
    if not isinstance(games, list) or len(games) != 2:
        count = f"{len(games)} of them" if isinstance(games, list) else one_line(repr(games), 60)
        raise UsageError(f"{where}: games: {count}; needed: two, the second one with the positions swapped")
    labels = [_label(f"{where}: game {place}", game) for place, game in enumerate(games, start=1)]
    if None in labels:
        return Judgment(math.nan, 0)
    (first, first_weight), (second, second_weight) = (LABELS[label] for label in labels if label is not None)
    return Judgment((1 - first) * first_weight + second * second_weight, first_weight + second_weight)


def _label(where: str, game: Json) -> str | None:
    """Return a game's label; None where the judge gave none."""
    if game is not None and (not isinstance(game, dict) or "score" not in game):
        raise UsageError(f"{where}: {one_line(repr(game), 60)}; needed: an object with score, or null")
    label = None if game is None else game["score"]
    if label is None or label == "":
        return None
    if not isinstance(label, str) or label not in LABELS:
        raise UsageError(f"{where}: score {one_line(repr(label), 60)}; allowed: {', '.join(LABELS)}, or null")
    return label


def judgment_scores(runs: Mapping[RunKey, Judgments], sources: Mapping[RunKey, Path]) -> pd.DataFrame:
    """Return scores in long form: one row per run and prompt, the prompt its own cluster; NaN where a game is null."""
    asked = list(dict.fromkeys(name for run in runs.values() for name in run.by_prompt))
    frames = []
    for key, run in runs.items():
        found = [run.by_prompt.get(name) for name in asked]
        columns = {
            "arm": key[0],
            "config": GIVEN_CONFIG,
            "seed": key[1],
            "split": "golden",
            "prompt_id": asked,
            "scorer": SCORER,
            "score": [math.nan if one is None else one.score for one in found],
            "cluster": asked,
            "tokens": None,
            "chars": None,
            "unscored_reason": [_NO_ROW if one is None else "" if one.weight else _NULL for one in found],
            "stage": "confirm",
            "flag": "",
            "source": str(sources[key]),
            "note": note_column(_notes(run, len(asked)), len(asked)),
        }
        frames.append(pd.DataFrame(columns))
    return pd.concat(frames, ignore_index=True)


def _notes(run: Judgments, total: int) -> list[str]:
    """Return how many of all prompts are unscored, by reason."""
    nulls = sum(not one.weight for one in run.by_prompt.values())
    counts = ((nulls, _NULL), (total - len(run.by_prompt), _NO_ROW))
    return [f"{count} of {total} prompts are unscored: {reason}" for count, reason in counts if count]


def judgment_notes(runs: Mapping[RunKey, Judgments]) -> Iterator[str]:
    """Yield a line per run for the terminal: Arena-Hard's own score beside the mean of the prompts' scores."""
    for key, run in runs.items():
        scores = [one.score for one in run.by_prompt.values() if one.weight]
        yield (
            f"{run_name(key)}: {sum(scores) / len(scores):.1%} over {len(scores)} of {len(run.by_prompt)} prompts; "
            f"Arena-Hard's own score, over weighted games: {run.own_score:.1%}"
        )
