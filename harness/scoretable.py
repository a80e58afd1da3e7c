"""The table of scores: each arm's mean by each scorer, with its interval."""

from __future__ import annotations

import numpy as np

from harness.frames import Table, build, columns, run_means
from harness.palette import BASE
from harness.stats import contrast
from harness.study import Config, Study
from harness.wording import MISSING, PREFERENCE, SCORERS, levels, number, percent, plural, points

_SPREAD = "Standard deviation over seeds, points"


def score_table(study: Study) -> Table | None:
    """Every scorer's mean on the shown split, with its interval; the deciding one first."""
    names = [n for n in study.confirmed["scorer"].unique() if not n.startswith(PREFERENCE) or n == study.metric]
    names.sort(key=lambda name: name != study.metric)
    rows = {}
    for scorer in names:
        decides = " (decides)" if scorer == study.metric else ""
        rows[SCORERS.get(scorer, scorer) + decides] = _cells(study, scorer)
    if not rows:
        return None
    seeds = {study.label(c): len(run_means(study, c, study.metric, study.split)) for c in study.with_base}
    rows[_SPREAD] = _spreads(study)
    rows["Seeds"] = {label: str(count) for label, count in seeds.items()}
    rows |= _unscored(study)
    return build(
        f"Scores on the {study.split} set: mean over prompts and seeds, higher is better",
        "Scorer",
        rows,
        columns(study, study.with_base),
        f"In brackets the {levels(study)[0]} interval of that arm's mean, over seeds and prompts as in the decision "
        "(with one seed over prompts alone). The arms answer the same prompts: that two intervals overlap does not "
        "make them alike; look at the interval of the difference.",
        ""
        if study.base
        else "No SFT base is stored in this study, so there is nothing to compare with before training.",
    )


def _cells(study: Study, scorer: str) -> dict[str, str]:
    """Return `{column header: mean and interval}`."""
    cells = {}
    for config in study.with_base:
        means = run_means(study, config, scorer, study.split)
        if len(means):
            ends = mean_interval(study, config, scorer)
            shown = f" ({100 * ends[0]:.1f} to {100 * ends[1]:.1f})" if ends else ""
            cells[study.label(config)] = percent(means.mean()) + shown
    return cells


def mean_interval(study: Study, config: Config, scorer: str) -> tuple[float, float] | None:
    """Return the interval of a config's mean at the study's confidence; prompts unscored in a run are left out.

    The variance is the rule's own (`harness.stats.contrast`) with one arm: its seeds, and the prompts.

    Returns:
        None with fewer than two prompts that are scored in all runs, or where the runs do not hold the same prompts.
    """
    rows = study.scores
    rows = rows[(rows["arm"] == config.arm) & (rows["split"] == study.split) & (rows["scorer"] == scorer)]
    rows = rows if config.arm == BASE else rows[rows["config"] == config.label]
    if rows.empty or rows.duplicated(["seed", "prompt_id"]).any():
        return None
    table = rows.pivot(index="prompt_id", columns="seed", values="score").dropna()
    if len(table) < 2:
        return None
    clusters = rows.drop_duplicates("prompt_id").set_index("prompt_id")["cluster"].reindex(table.index)
    labels = clusters.to_numpy() if (clusters != "").all() else None
    if labels is not None and len(set(labels)) < 2:
        return None
    alpha = number(study.verdict.get("alpha"))
    found = contrast([table.to_numpy(dtype=float).T], [1.0], labels)
    low, high = found.interval(1 - (0.05 if alpha is None else alpha))
    return float(np.clip(low, 0, 1)), float(np.clip(high, 0, 1))


def _spreads(study: Study) -> dict[str, str]:
    means = {study.label(c): run_means(study, c, study.metric, study.split) for c in study.with_base}
    return {
        label: points(found.std(ddof=1), signed=False) if len(found) > 1 else MISSING for label, found in means.items()
    }


def _unscored(study: Study) -> dict[str, dict[str, str]]:
    """Count prompts without a score, by reason, where there are any."""
    rows = study.confirmed
    empty = rows[rows["score"].isna() & (rows["scorer"] == study.metric)]
    cells = {}
    for config in study.with_base if len(empty) else ():
        mine = empty[(empty["arm"] == config.arm) & ((empty["config"] == config.label) | (config.arm == BASE))]
        reasons = mine["unscored_reason"].value_counts().items()
        text = "; ".join(f"{plural(count, 'prompt')}: {reason or 'no reason given'}" for reason, count in reasons)
        cells[study.label(config)] = text or "0"
    return {"Unscored (not counted as 0)": cells} if cells else {}
