"""Runs of an arm that are copies of one another: scores in long form -> the runs to leave out, and warnings.

A seed stands for a training of its own. One run that is listed under several seeds, or seeds whose training has changed
nothing, would pass for evidence that the result holds for another training.
"""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from harness.decide.words import plural

MIN_PROMPTS = 30  # on fewer prompts, two trainings may well be right and wrong on the same ones
_ANSWER = ("tokens", "chars")  # lengths of the answers, where the scores have them


def drop_copies(frame: pd.DataFrame, metric: str, configs: Mapping[str, str]) -> tuple[pd.DataFrame, list[str]]:
    """Return the scores without runs that are copies of an earlier one, and a warning for each arm with some.

    Copies have the same score, and answers of the same length, on every golden prompt. Runs with one score for all
    prompts (all right; diverged, and so scored as worst) are none.

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
        alike: dict[tuple[object, ...], list[str]] = {}
        for seed, rows in runs.groupby("seed", sort=False):
            if rows["score"].nunique() > 1 and rows["prompt_id"].nunique() >= MIN_PROMPTS:
                alike.setdefault(_content(rows), []).append(str(seed))
        for seeds in (seeds for seeds in alike.values() if len(seeds) > 1):
            count = runs["prompt_id"].nunique()
            warnings.append(
                f"{arm}: seeds {', '.join(seeds)} are copies of one run, or of a training that has changed nothing: "
                f"their scores are equal on all {plural(count, 'prompt')}; they are counted once"
            )
            is_copy = (frame["arm"] == arm) & (frame["config"] == config) & frame["seed"].isin(seeds[1:])
            frame = frame[~is_copy]
    return frame, warnings


def _content(rows: pd.DataFrame) -> tuple[object, ...]:
    """Return what two copies have in common: scores and lengths, by prompt."""
    ordered = rows.sort_values("prompt_id")
    columns = ["prompt_id", "score", *(name for name in _ANSWER if name in ordered)]
    return tuple(ordered[columns].fillna(-1).itertuples(index=False, name=None))
