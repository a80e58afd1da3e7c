"""What scores say beside the numbers: the runs' files, notes about a scorer, and what the other metric would say.

Input: scores in long form with the optional columns `source` and `note` -> `sources` and warnings for the verdict.
"""

from __future__ import annotations

from collections.abc import Collection

import pandas as pd

from harness.config.arms import title
from harness.decide.rule import verdict
from harness.decide.scores_file import DEFAULTS, PSEUDO_VALUES, as_names, checked
from harness.decide.words import interval, points
from harness.study.decision import Verdict
from harness.study.errors import UsageError
from harness.study.text import one_line

RAW = ("win_rate", "judge", "reward_model")  # metrics that a length-controlled one has been made of
_SHOWN = 400  # characters of a note


def add_notes(scores: pd.DataFrame, result: Verdict, cluster: str | None = None) -> None:
    """Add to a verdict what its scores say beside it: the runs' files, notes, and what the other metric would say."""
    if sources := run_sources(scores, result):
        result["sources"] = sources
    result["warnings"] += [*note_warnings(scores, result), *metric_warnings(scores, result, cluster)]


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


def other_metrics(scores: pd.DataFrame, metric: str) -> list[str]:
    """Return the raw metrics where a length-controlled one decides, and the other way round; only those scored."""
    found = dict.fromkeys(as_names(scores["scorer"])) if "scorer" in scores else {}
    if metric.startswith(PSEUDO_VALUES):
        return [name for name in found if name in RAW][:1]
    return [name for name in found if name.startswith(PSEUDO_VALUES)] if metric in RAW else []


def metric_warnings(scores: pd.DataFrame, result: Verdict, cluster: str | None = None) -> list[str]:
    """Say what the other metrics would have decided, where that is another verdict.

    Args:
        scores: in long form, all scorers.
        result: the verdict on them.
        cluster: as in `harness.decide.rule.verdict`.
    """
    arms = (result["arms"][0], result["arms"][1])
    found = []
    for other in other_metrics(scores, result["metric"]):
        try:
            again = verdict(
                scores, metric=other, margin=result["margin"], alpha=result["alpha"], arms=arms, cluster=cluster
            )
        except UsageError:
            continue  # these scores cannot be compared; the verdict does not need them
        if again["verdict"] != (decided := _by_scores(result)):
            found.append(
                f"the metric decides: on {result['metric']}: {decided} ({_numbers(result)}), on {other}: "
                f"{again['verdict']} ({_numbers(again)}); the answer depends on whether length counts, so name the "
                "metric beside the verdict"
            )
    return found


def _by_scores(result: Verdict) -> str:
    """Return the verdict without its guards: they are no matter of the metric."""
    if result["verdict"] != "trade-off":
        return result["verdict"]
    return result["arms"][0] if result["difference"] > 0 else result["arms"][1]


def _numbers(result: Verdict) -> str:
    first, second = result["arms"]
    return f"{title(first)} minus {title(second)} {points(result['difference'])} points, {interval(result['ci95'])}"
