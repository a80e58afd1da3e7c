"""Read a scores file, whoever wrote it, check it, and lay it out as one array an arm: (num_seeds, num_prompts).

Nothing is repaired: what is wrong is named, with arm, seed and prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from harness.records import UsageError

REQUIRED = ("arm", "seed", "score")
DEFAULTS = {"config": "", "split": "golden", "scorer": "score", "unscored_reason": "", "stage": "", "flag": ""}
_RUN = ["arm", "config", "seed"]


def read_scores(path: Path) -> pd.DataFrame:
    """Read CSV, Parquet or JSONL by its suffix.

    Raises:
        UsageError: for a missing or unreadable file or an unknown suffix.
    """
    readers = {
        ".csv": lambda: pd.read_csv(path, dtype={"prompt_id": str, "cluster": str, "config": str}),
        ".parquet": lambda: pd.read_parquet(path),
        ".jsonl": lambda: pd.read_json(path, lines=True, dtype={"prompt_id": str, "cluster": str, "config": str}),
    }
    if not path.is_file():
        raise UsageError(f"{path}: no such file; give a scores file (.csv, .parquet, .jsonl) or a folder of results/")
    if path.suffix not in readers:
        raise UsageError(f"{path}: cannot tell its kind by {path.suffix!r}; allowed: {', '.join(readers)}")
    try:
        return readers[path.suffix]()
    except (ValueError, OSError) as error:
        raise UsageError(f"{path}: not readable as {path.suffix} ({error})") from error


def checked(scores: pd.DataFrame) -> pd.DataFrame:
    """Return the scores with every column there, or raise a UsageError that names the first bad row of each kind."""
    missing = [column for column in REQUIRED if column not in scores.columns]
    if missing:
        raise UsageError(
            f"scores: column {', '.join(missing)} is missing; found: {', '.join(map(str, scores.columns))}; "
            f"needed: {', '.join(REQUIRED)}, and prompt_id where a run has one score for each prompt"
        )
    if scores.empty:
        raise UsageError("scores: no rows")
    frame = scores.copy()
    for column, value in DEFAULTS.items():
        frame[column] = frame[column].astype(object).fillna(value).astype(str) if column in frame else value
    frame["arm"] = frame["arm"].astype(str)
    numbers = pd.to_numeric(frame["score"], errors="coerce")
    text = frame["score"].notna() & numbers.isna()
    _refuse(frame[text], lambda row: f"score {row['score']!r} is not a number")
    frame["score"] = numbers
    _refuse(
        frame[numbers.isna() & (frame["unscored_reason"] == "")],
        lambda row: "the score is NaN; a prompt without a score needs an unscored_reason",
    )
    _refuse(
        frame[numbers.notna() & ~numbers.between(0, 1)],
        lambda row: f"score {row['score']:g} is outside [0, 1]; rescale it, higher is better",
    )
    key = [*_RUN, "split", "scorer", *(["prompt_id"] if "prompt_id" in frame else [])]
    _refuse(frame[frame.duplicated([*key, "stage"])], lambda row: "this row stands twice")
    return frame


def _refuse(rows: pd.DataFrame, message: Callable[[pd.Series], str]) -> None:
    if len(rows):
        first = rows.iloc[0]
        prompt = f", prompt {first['prompt_id']}" if "prompt_id" in rows else ""
        where = f"arm {first['arm']}, seed {first['seed']}{prompt}, scorer {first['scorer']}"
        raise UsageError(f"scores: {where}: {message(first)} ({len(rows)} such rows)")


def choose_metric(frame: pd.DataFrame, metric: str | None) -> str:
    """Return the scorer to decide on: the one asked for, or the only one."""
    found = sorted(frame["scorer"].unique())
    if metric is None and len(found) == 1:
        return str(found[0])
    if metric is None:
        raise UsageError(f"scores: several scorers ({', '.join(found)}); choose one with --metric")
    if metric not in found:
        raise UsageError(f"metric {metric}: no such scorer in the scores; found: {', '.join(found)}")
    return metric


@dataclass(frozen=True)
class ArmScores:
    """One arm's scores.

    Attributes:
        config: the config's label.
        seeds: one a row of `values`.
        prompts: one a column of `values`; empty where a run has one score.
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


def arm_scores(frame: pd.DataFrame, arm: str, config: str, cluster: str | None) -> ArmScores:
    """Lay one config's rows of one scorer and split out as an array.

    Raises:
        UsageError: where its runs were not scored on the same prompts, or rows of a prompt name several clusters.
    """
    rows = frame[(frame["arm"] == arm) & (frame["config"] == config)]
    if rows.empty:
        raise UsageError(f"scores: arm {arm}, config {config or '(none)'} has no rows of this scorer; score it first")
    flags = {str(seed): str(part["flag"].max()) for seed, part in rows.groupby("seed") if part["flag"].max()}
    if "prompt_id" not in rows:
        rows = rows.sort_values("seed")
        return ArmScores(
            config, tuple(map(str, rows["seed"])), (), rows[["score"]].to_numpy(float), np.array([]), flags
        )
    rows = rows.assign(prompt_id=rows["prompt_id"].astype(str))
    table = rows.pivot_table(index="seed", columns="prompt_id", values="score", aggfunc="first", dropna=False)
    counts = rows.groupby("seed")["prompt_id"].nunique()
    if counts.nunique() > 1 or counts.iloc[0] != table.shape[1]:
        _refuse_unequal(arm, rows, list(table.columns))
    clusters = _clusters(rows, cluster).reindex(table.columns)
    return ArmScores(
        config,
        tuple(map(str, table.index)),
        tuple(map(str, table.columns)),
        table.to_numpy(float),
        clusters.to_numpy(str),
        flags,
    )


def _refuse_unequal(arm: str, rows: pd.DataFrame, prompts: Sequence[str]) -> None:
    for seed, part in rows.groupby("seed"):
        lacking = sorted(set(prompts) - set(part["prompt_id"]))
        if lacking:
            raise UsageError(
                f"scores: arm {arm}, seed {seed} has no row for {len(lacking)} prompts that other seeds have "
                f"(first: {lacking[0]}); score all runs on the same prompts"
            )


def _clusters(rows: pd.DataFrame, cluster: str | None) -> pd.Series:
    """Return each prompt's cluster: the named column's value, or the prompt itself where it is empty."""
    column = cluster or "cluster"
    if cluster and cluster not in rows:
        raise UsageError(f"--cluster {cluster}: no such column; found: {', '.join(map(str, rows.columns))}")
    if column not in rows:
        return pd.Series({prompt: prompt for prompt in rows["prompt_id"]})
    labels = rows[column].fillna("").astype(str)
    labels = labels.where(labels != "", "prompt " + rows["prompt_id"])
    grouped = labels.groupby(rows["prompt_id"])
    several = grouped.nunique()
    if (several > 1).any():
        prompt = several[several > 1].index[0]
        raise UsageError(f"scores: prompt {prompt} has several clusters: {sorted(set(grouped.get_group(prompt)))}")
    return grouped.first()


def same_prompts(arms: dict[str, ArmScores]) -> None:
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
