"""Scores files of any origin -> checked scores in long form -> one array per arm, shape (num_seeds, num_prompts).

Nothing is repaired: an unusable row is refused, with its arm, seed and prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from harness.study.errors import UsageError
from harness.study.files import Json
from harness.study.scores_csv import read_scores_csv, read_scores_jsonl

REQUIRED = ("arm", "seed", "score")
DEFAULTS = {"config": "", "split": "golden", "scorer": "score", "unscored_reason": "", "stage": "", "flag": ""}
PSEUDO_VALUES = "length_controlled"  # prefix of the scorers whose rows are jackknife values
_RUN = ["arm", "config", "seed"]
_TRUTH = {"true": 1.0, "false": 0.0}


def read_scores(path: Path) -> pd.DataFrame:
    """Read CSV, Parquet or JSONL by its suffix.

    Every field of a CSV but the score stays text: an arm may be called `NA` and a prompt `007`. Only an empty score is
    a missing one.

    Raises:
        UsageError: a missing, unreadable or truncated file, or an unknown suffix.
    """
    readers: dict[str, Callable[[Path], pd.DataFrame]]
    readers = {".csv": read_scores_csv, ".parquet": pd.read_parquet, ".jsonl": read_scores_jsonl}
    if not path.is_file():
        raise UsageError(f"{path}: no such file; give a scores file (.csv, .parquet, .jsonl) or a folder of results/")
    if path.suffix not in readers:
        raise UsageError(f"{path}: cannot tell its kind by {path.suffix!r}; allowed: {', '.join(readers)}")
    try:
        frame = readers[path.suffix](path)
    except (ValueError, OSError) as error:
        raise UsageError(f"{path}: not readable as {path.suffix} ({error})") from error
    if "score" in frame:
        numbers = _as_numbers(frame["score"])
        if not _is_no_number(frame["score"], numbers).any():  # else it stays, for `checked` to quote
            frame["score"] = numbers
    return frame


def checked(scores: pd.DataFrame) -> pd.DataFrame:
    """Return the scores with all columns: names as text, scores as floats in [0, 1], NaN where unscored.

    Jackknife values (scorers called `length_controlled...`) may be any number: only their mean lies in [0, 1].

    Raises:
        UsageError: the number, arm, seed and prompt of the first bad row of the first kind found.
    """
    missing = [column for column in REQUIRED if column not in scores.columns]
    if missing:
        raise UsageError(
            f"scores: column {', '.join(missing)} is missing; found: {', '.join(map(str, scores.columns))}; "
            f"needed: {', '.join(REQUIRED)}, and prompt_id unless a run has one score"
        )
    if scores.empty:
        raise UsageError("scores: no rows")
    frame = scores.reset_index(drop=True)
    for column, value in DEFAULTS.items():
        frame[column] = as_names(frame[column], blank=value) if column in frame else value
    names = ["arm", "seed", *(["prompt_id"] if "prompt_id" in frame else [])]
    for column in names:
        frame[column] = as_names(frame[column])
    for column in names:
        hint = "; leave the column out where a run has one score" if column == "prompt_id" else ""
        _refuse(frame[frame[column] == ""], f"{column} is empty{hint}")
    _check_scores(frame)
    hint = "" if "prompt_id" in frame else "; several scores a run need a prompt_id column"
    key = [*_RUN, "split", "scorer", "stage", *names[2:]]
    _refuse(frame[frame.duplicated(key)], f"this row stands twice{hint}")
    return frame


def _check_scores(frame: pd.DataFrame) -> None:
    """Turn the scores of a frame into numbers, or refuse them."""
    numbers = _as_numbers(frame["score"])
    _refuse(
        frame[_is_no_number(frame["score"], numbers)],
        lambda row: f"score {row['score']!r} is not a number; leave it empty with an unscored_reason if there is none",
    )
    frame["score"] = numbers
    has_reason = frame["unscored_reason"] != ""
    _refuse(
        frame[numbers.isna() & ~has_reason],
        "the score is empty or NaN; a prompt without a score needs an unscored_reason",
    )
    _refuse(
        frame[numbers.notna() & ~numbers.between(0, 1) & ~_are_pseudo_values(frame)],
        lambda row: f"score {row['score']:g} is outside [0, 1]; rescale it, higher is better",
    )
    _refuse(
        frame[numbers.notna() & has_reason],
        lambda row: (
            f"score {row['score']:g} and an unscored_reason ({row['unscored_reason']!r}); leave one of them out"
        ),
    )


def _are_pseudo_values(frame: pd.DataFrame) -> pd.Series:
    """Return which rows hold jackknife values: their mean is a win rate in [0, 1], single ones may lie outside."""
    return frame["scorer"].str.startswith(PSEUDO_VALUES) & np.isfinite(frame["score"])


def as_names(column: pd.Series, blank: str = "") -> pd.Series:
    """Return names as text: 7 and 7.0 become "7", "007" and "NA" stay, missing and empty ones become `blank`."""
    objects = column.astype("object")
    texts = objects.map(_as_name).where(objects.notna(), "").astype("object")
    return texts.where(texts != "", blank)


def _as_name(value: Json) -> str:
    # Integers with a gap among them come out of pandas and Parquet as floats.
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _as_numbers(scores: pd.Series) -> pd.Series:
    """Return floats, NaN where there is no number; true and false, as pass and fail, are 1 and 0."""
    words = scores.astype("object").map(
        lambda score: _TRUTH.get(score.lower(), score) if isinstance(score, str) else score
    )
    return pd.to_numeric(words, errors="coerce").astype(float)


def _is_no_number(scores: pd.Series, numbers: pd.Series) -> pd.Series:
    return numbers.isna() & scores.notna() & (scores.astype("object") != "")


def _refuse(rows: pd.DataFrame, message: str | Callable[[pd.Series], str]) -> None:
    """Raise a UsageError about the first of some rows, if there are any."""
    if len(rows):
        first = rows.iloc[0]
        problem = message if isinstance(message, str) else message(first)
        prompt = f", prompt {first['prompt_id']}" if "prompt_id" in rows else ""
        where = f"row {rows.index[0] + 1} (arm {first['arm']}, seed {first['seed']}{prompt}, scorer {first['scorer']})"
        raise UsageError(f"scores: {where}: {problem} ({len(rows)} such row{'s' if len(rows) > 1 else ''})")


def choose_metric(frame: pd.DataFrame, metric: str | None, arms: Sequence[str] = ()) -> str:
    """Return the scorer to decide on: the requested one, or the only one.

    Args:
        frame: checked scores.
        metric: the requested scorer.
        arms: consider only rows of these arms; empty for all.

    Raises:
        UsageError: no rows of the arms, no such scorer, or several and none requested.
    """
    present = sorted(frame["arm"].unique())
    rows = frame[frame["arm"].isin(arms)] if arms else frame
    if rows.empty:
        raise UsageError(
            f"scores: no rows of arms {', '.join(arms)}; arms in the scores: {', '.join(present)}; "
            "name the two to compare (--arms, or arms=)"
        )
    found = sorted(rows["scorer"].unique())
    if metric is None and len(found) == 1:
        return str(found[0])
    if metric is None:
        raise UsageError(f"scores: several scorers ({', '.join(found)}); choose one with --metric")
    if metric not in found:
        raise UsageError(f"metric {metric}: no such scorer in the scores; found: {', '.join(found)}")
    return metric


def prompts_behind(frame: pd.DataFrame, metric: str, arms: Sequence[str]) -> int | None:
    """Return the prompts behind each score, where a run has one score; None where they are rows, or not known.

    Args:
        frame: checked scores; their number stands in the column `n_prompts`, where there is one.
        metric: the scorer that decides.
        arms: the arms that are compared.

    Raises:
        UsageError: a number below 2, or other numbers for other runs.
    """
    if "prompt_id" in frame or "n_prompts" not in frame:
        return None
    rows = frame[frame["arm"].isin(list(arms)) & (frame["split"] == "golden") & (frame["scorer"] == metric)]
    found = sorted(as_names(rows["n_prompts"]).unique())
    if len(found) != 1 or not found[0].isdecimal() or int(found[0]) < 2:
        raise UsageError(
            f"scores: n_prompts is {', '.join(map(repr, found))}; give one whole number of at least 2 for all runs: "
            "the prompts behind each score"
        )
    return int(found[0])


@dataclass(frozen=True)
class ArmScores:
    """One arm's scores.

    Attributes:
        config: the config's label.
        seeds: one per row of `values`.
        prompts: one per column of `values`; empty where a run has one score.
        values: shape (num_seeds, num_prompts), or (num_seeds, 1) without prompts; NaN where unscored.
        clusters: label of each prompt.
        flags: rows' flag (`diverged`, `collapsed`) by seed, where there is one.
    """

    config: str
    seeds: tuple[str, ...]
    prompts: tuple[str, ...]
    values: np.ndarray
    clusters: np.ndarray
    flags: dict[str, str]

    @property
    def run_means(self) -> dict[str, float]:
        """Mean score of each run, by seed."""
        return dict(zip(self.seeds, self.values.mean(1).tolist(), strict=True))


def arm_scores(frame: pd.DataFrame, arm: str, config: str, cluster: str | None = None) -> ArmScores:
    """Lay out one config's rows of one scorer and split as an array.

    Raises:
        UsageError: its runs were not scored on the same prompts, or rows of a prompt name several clusters.
    """
    rows = frame[(frame["arm"] == arm) & (frame["config"] == config)]
    if rows.empty:
        raise UsageError(f"scores: arm {arm}, config {config or '(none)'} has no rows of this scorer; score it first")
    flags = {str(seed): str(part["flag"].max()) for seed, part in rows.groupby("seed") if part["flag"].max()}
    has_prompts = "prompt_id" in rows
    stages = ", ".join(sorted(rows["stage"].unique()))
    again = rows.duplicated(["seed", "prompt_id"] if has_prompts else ["seed"])
    _refuse(rows[again], f"scored in several stages ({stages}); keep one, or call the one that counts confirm")
    order = sorted(rows["seed"].unique(), key=_by_number)
    if not has_prompts:
        values = rows.set_index("seed").loc[order, ["score"]].to_numpy(float)
        return ArmScores(config, tuple(order), (), values, np.array([]), flags)
    table = rows.pivot(index="seed", columns="prompt_id", values="score").loc[order]
    counts = rows.groupby("seed")["prompt_id"].nunique()
    if counts.nunique() > 1 or counts.iloc[0] != table.shape[1]:
        _refuse_unequal(arm, rows, list(table.columns))
    clusters = _cluster_by_prompt(rows, cluster).reindex(table.columns)
    return ArmScores(
        config,
        tuple(order),
        tuple(map(str, table.columns)),
        table.to_numpy(float),
        clusters.to_numpy(str),
        flags,
    )


def _by_number(seed: str) -> tuple[int, str]:
    return (int(seed), "") if seed.isdecimal() else (-1, seed)


def _refuse_unequal(arm: str, rows: pd.DataFrame, prompts: Sequence[str]) -> None:
    for seed, part in rows.groupby("seed"):
        lacking = sorted(set(prompts) - set(part["prompt_id"]))
        if lacking:
            raise UsageError(
                f"scores: arm {arm}, seed {seed} has no row for {len(lacking)} prompts that other seeds have "
                f"(first: {lacking[0]}); score all runs on the same prompts"
            )


def _cluster_by_prompt(rows: pd.DataFrame, cluster: str | None) -> pd.Series:
    """Return each prompt's cluster: the named column's value, or the prompt itself where it is empty."""
    column = cluster or "cluster"
    if cluster and cluster not in rows:
        raise UsageError(f"--cluster {cluster}: no such column; found: {', '.join(map(str, rows.columns))}")
    if column not in rows:
        return pd.Series({prompt: prompt for prompt in rows["prompt_id"]})
    labels = as_names(rows[column])
    labels = labels.where(labels != "", "prompt " + rows["prompt_id"])
    grouped = labels.groupby(rows["prompt_id"])
    several = grouped.nunique()
    if (several > 1).any():
        prompt = several[several > 1].index[0]
        raise UsageError(f"scores: prompt {prompt} has several clusters: {sorted(set(grouped.get_group(prompt)))}")
    return grouped.first()


def same_prompts(arms: Mapping[str, ArmScores]) -> None:
    """Raise a UsageError unless all arms were scored on the same prompts, in the same clusters."""
    (name_a, first), *others = arms.items()
    for name_b, other in others:
        if first.prompts != other.prompts:
            only = sorted(set(first.prompts) ^ set(other.prompts))
            owner = name_a if only[0] in first.prompts else name_b
            raise UsageError(
                f"scores: {name_a} and {name_b} were not scored on the same prompts: {len(only)} differ "
                f"(first: {only[0]}, only in {owner}); score both on one golden set"
            )
        if list(first.clusters) != list(other.clusters):
            raise UsageError(f"scores: {name_a} and {name_b} name different clusters for the same prompts")
