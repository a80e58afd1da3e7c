"""Runs of an arm that are copies of one another: scores in long form -> the runs to leave out, and warnings.

A seed stands for a training of its own. One run that is listed under several seeds, or seeds whose training has changed
nothing, would pass for evidence that the result holds for another training.
"""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from harness.decide.words import plural

MIN_PROMPTS = 30  # on fewer prompts, two trainings may well be right and wrong on the same ones
_MIN_VALUES = 8  # different scores, which two trainings do not share by chance on any number of prompts
_ROUNDING = 6e-4  # what one file may have rounded: to three decimals
_ANSWER = ("tokens", "chars")  # lengths of the answers, where the scores have them


def drop_copies(frame: pd.DataFrame, metric: str, configs: Mapping[str, str]) -> tuple[pd.DataFrame, list[str]]:
    """Return the scores without runs that are copies of an earlier one, and a warning for each arm with some.

    Copies have the same score but for rounding, and answers of the same length, on every golden prompt. Runs with one
    score for all prompts (all right; diverged, and so scored as worst) are none.

    Args:
        frame: checked scores (`harness.decide.scores_file.checked`).
        metric: the scorer that decides.
        configs: the deciding config of each arm.
    """
    if "prompt_id" not in frame:
        return frame, []
    warnings: list[str] = []
    golden = frame[(frame["split"] == "golden") & (frame["scorer"] == metric)]
    for arm, config in configs.items():
        runs = golden[(golden["arm"] == arm) & (golden["config"] == config)]
        alike: list[tuple[pd.DataFrame, list[str]]] = []
        for seed, rows in runs.groupby("seed", sort=False):
            content = _content(rows)
            if _is_telling(content):
                first = next((one for one in alike if _is_copy(one[0], content)), None)
                if first is None:
                    alike.append((content, [str(seed)]))
                else:
                    first[1].append(str(seed))
        for seeds in (seeds for _, seeds in alike if len(seeds) > 1):
            count = runs["prompt_id"].nunique()
            warnings.append(
                f"{arm}: seeds {', '.join(seeds)} are copies of one run, or of a training that has changed nothing: "
                f"their scores are equal on all {plural(count, 'prompt')}; they are counted once"
            )
            is_copy = (frame["arm"] == arm) & (frame["config"] == config) & frame["seed"].isin(seeds[1:])
            frame = frame[~is_copy]
    return frame, warnings


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
