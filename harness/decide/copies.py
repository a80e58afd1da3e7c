"""Runs of an arm that are copies of one another: scores in long form -> the runs to leave out, and warnings.

A seed stands for a training of its own. One run that is listed under several seeds, or seeds whose training has changed
nothing, would pass for evidence that the result holds for another training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from typing import TypeVar

import pandas as pd

from harness.decide.words import plural

ANSWERS = "answers_sha256"  # column of scores
Run = TypeVar("Run")

MIN_PROMPTS = 30  # on fewer prompts, two trainings may well be right and wrong on the same ones
_MIN_VALUES = 8  # different scores, which two trainings do not share by chance on any number of prompts
_ROUNDING = 6e-4  # what one file may have rounded: to three decimals
_ANSWER = ("tokens", "chars")  # lengths of the answers, where the scores have them
_SHORT_DECIMALS, _FEW_PROMPTS = 3, 100  # one score a run: runs share .612 or 61/100 by chance, and no longer numbers
_EQUAL = 1e-12


def drop_copies(frame: pd.DataFrame, metric: str, configs: Mapping[str, str]) -> tuple[pd.DataFrame, list[str]]:
    """Return the scores without runs that are copies of an earlier one, and a warning for each group of copies.

    Copies have the same score but for rounding, and answers of the same length, on every golden prompt; or the same
    answers. Runs with one score for all prompts (all right; diverged, and so scored as worst) are none by their scores.
    Where a run has one score, runs of an arm are copies if they share all of its digits, and so many digits that
    chance does not explain it, or if all runs of the arm share it.

    Args:
        frame: checked scores (`harness.decide.scores_file.checked`), in `answers_sha256` the hash of a run's answers.
        metric: the scorer that decides.
        configs: the deciding config of each arm.
    """
    warnings: list[str] = []
    golden = frame[(frame["split"] == "golden") & (frame["scorer"] == metric)]
    for arm, config in configs.items():
        runs = golden[(golden["arm"] == arm) & (golden["config"] == config)]
        if "prompt_id" in frame:
            groups = _copies_by_prompt(runs)
            count = runs["prompt_id"].nunique()
            said = f"equal on all {plural(count, 'prompt')}"
        else:
            groups, chance = _copies_of_one_score(runs)
            said = "equal to the last digit"
            warnings += [
                f"{arm}: seeds {', '.join(seeds)} have the same score, which is so short that chance may do it; each "
                "counts, but give all digits, or scores by prompt"
                for seeds in chance
            ]
        for seeds, what in groups:
            warnings.append(
                f"{arm}: seeds {', '.join(seeds)} are copies of one run, or of a training that has changed nothing: "
                f"their {what} are {said}; they are counted once"
            )
            is_copy = (frame["arm"] == arm) & (frame["config"] == config) & frame["seed"].isin(seeds[1:])
            frame = frame[~is_copy]
    return frame, warnings


def _copies_by_prompt(runs: pd.DataFrame) -> list[tuple[list[str], str]]:
    """Return groups of seeds with equal scores or equal answers, each with what is equal."""
    contents = {str(seed): _content(rows) for seed, rows in runs.groupby("seed", sort=False)}
    telling = {seed: content for seed, content in contents.items() if _is_telling(content)}
    groups = [(seeds, "scores") for seeds in _groups(telling.items(), _is_copy)]
    if runs["prompt_id"].nunique() < MIN_PROMPTS or ANSWERS not in runs:
        return groups
    hashes = runs.groupby("seed", sort=False)[ANSWERS].first()
    known = {str(seed): str(found) for seed, found in hashes.items() if isinstance(found, str) and found}
    named = [set(seeds) for seeds, _ in groups]
    for seeds in _groups(known.items(), lambda one, other: one == other):
        if not any(set(seeds) <= others for others in named):
            groups = [(others, what) for others, what in groups if not set(others) <= set(seeds)]
            groups.append((seeds, "answers"))
    return groups


def _copies_of_one_score(runs: pd.DataFrame) -> tuple[list[tuple[list[str], str]], list[list[str]]]:
    """Return groups of seeds with one score and what is equal, and those whose score is so short that chance may do."""
    scores = {str(seed): float(score) for seed, score in zip(runs["seed"], runs["score"], strict=True)}
    scored = {seed: score for seed, score in scores.items() if not math.isnan(score)}
    copies, chance = [], []
    for seeds in _groups(scored.items(), lambda one, other: abs(one - other) <= _EQUAL):
        if len(seeds) == len(scored) or not _is_short(scored[seeds[0]]):
            copies.append((seeds, "scores"))
        else:
            chance.append(seeds)
    return copies, chance


def _is_short(score: float) -> bool:
    """Return whether two trainings may well share this score: few decimals, or a share of few prompts."""
    nearest = float(Fraction(score).limit_denominator(_FEW_PROMPTS))
    return abs(round(score, _SHORT_DECIMALS) - score) <= _EQUAL or abs(nearest - score) <= _EQUAL


def _groups(runs: Iterable[tuple[str, Run]], is_copy: Callable[[Run, Run], bool]) -> list[list[str]]:
    """Return the seeds of runs that are copies of one another, in groups of two or more."""
    alike: list[tuple[Run, list[str]]] = []
    for seed, content in runs:
        first = next((seeds for one, seeds in alike if is_copy(one, content)), None)
        if first is None:
            alike.append((content, [seed]))
        else:
            first.append(seed)
    return [seeds for _, seeds in alike if len(seeds) > 1]


def _content(rows: pd.DataFrame) -> pd.DataFrame:
    """Return what two copies have in common: scores and lengths, by prompt."""
    columns = ["prompt_id", *(name for name in _ANSWER if name in rows), "score"]
    return rows.sort_values("prompt_id")[columns].fillna(-1).reset_index(drop=True)


def _is_telling(content: pd.DataFrame) -> bool:
    """Return whether two trainings do not have this content by chance."""
    values = content["score"].nunique()
    return values >= _MIN_VALUES or (values > 1 and content["prompt_id"].nunique() >= MIN_PROMPTS)


def _is_copy(one: pd.DataFrame, other: pd.DataFrame) -> bool:
    same = one.drop(columns="score").equals(other.drop(columns="score"))
    return same and bool(((one["score"] - other["score"]).abs() <= _ROUNDING).all())
