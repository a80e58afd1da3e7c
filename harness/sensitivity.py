"""How sensitive each arm was to its hyperparameters: the dev scores of all configs that were tried, collapsed ones too.

Input: a study whose configs were tuned. What is computed here describes this grid; it tests nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from harness.frames import Table, build, columns
from harness.palette import BASE
from harness.study import DIVERGED, FAILED, Config, Study, mapping
from harness.wording import percent, plural, points


@dataclass(frozen=True)
class Tried:
    """A config of the tuning stage.

    Attributes:
        values: its hyperparameters by name.
        mean: mean dev score over its tuning seeds; a collapsed or diverged run counts 0.
        seeds: number of tuning seeds that it was trained with.
        ruined: True where a run of it collapsed or diverged.
        selected: True where dev selected it.
    """

    arm: str
    label: str
    values: dict[str, float]
    mean: float
    seeds: int
    ruined: bool
    selected: bool


def tried_configs(study: Study) -> dict[str, list[Tried]]:
    """Return the configs of each arm that has several with dev scores; failed ones have none and are not here."""
    rows = study.scores
    seeds = study.settings.get("tuning_seeds") or []
    dev = rows[(rows["split"] == "dev") & (rows["scorer"] == study.metric) & (rows["arm"] != BASE)]
    dev = dev[dev["seed"].isin(seeds)] if seeds else dev
    ruined = {
        (trial.arm, trial.config)
        for trial in study.trials
        if trial.state == DIVERGED or set(trial.manifest.get("flags") or []) & {"collapsed", "diverged"}
    }
    chosen = {arm: mapping(found).get("selected") for arm, found in mapping(study.selection.get("arms")).items()}
    means: dict[tuple[str, str], list[float]] = {}
    runs = dev.groupby(["arm", "config", "seed"], sort=False, as_index=False)["score"].mean()  # of 500 trials at once
    for arm, label, mean in runs[["arm", "config", "score"]].dropna().itertuples(index=False, name=None):
        means.setdefault((arm, label), []).append(mean)
    found: dict[str, list[Tried]] = {}
    for key, scores in means.items():
        is_ruined, is_selected = key in ruined, chosen.get(key[0]) == key[1]
        one = Tried(*key, _values(key[1]), fmean(scores), len(scores), is_ruined, is_selected)
        found.setdefault(key[0], []).append(one)
    return {arm: configs for arm in study.arms if len(configs := found.get(arm, [])) > 1}


def _values(label: str) -> dict[str, float]:
    pairs = (part.partition("=") for part in label.split(",") if "=" in part)
    return {name: number for name, _, text in pairs if (number := _number(text)) is not None}


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def expected_best(scores: Sequence[float]) -> list[float]:
    """Return the expected best of n configs drawn without replacement, for n = 1 to half of them.

    The unbiased estimator `sum_j v_(j) C(j-1, n-1) / C(N, n)` over the sorted scores (Tang et al. 2020, "Showing Your
    Work Doesn't Always Work"); descriptive: its variance is high, and it is no test.
    """
    ordered = sorted(scores)
    total = len(ordered)
    return [
        sum(value * math.comb(j, n - 1) for j, value in enumerate(ordered)) / math.comb(total, n)
        for n in range(1, max(1, total // 2) + 1)
    ]


def sensitivity_table(study: Study) -> Table | None:
    """Show the spread of dev scores over each arm's configs, and how many of them were ruined."""
    tried = tried_configs(study)
    if not tried:
        return None
    rows: dict[str, dict[str, str]] = {}
    base = _base_mean(study)
    for arm, configs in tried.items():
        means = np.array([config.mean for config in configs])
        low, middle, high = np.quantile(means, [0.25, 0.5, 0.75])
        cells = {
            "Configs tried": f"{len(configs)}",
            "Best": percent(means.max()),
            "Upper quartile": percent(high),
            "Median": percent(middle),
            "Lower quartile": percent(low),
            "Worst": percent(means.min()),
            "Standard deviation, points": points(means.std(ddof=1), signed=False),
            "Collapsed or diverged": _share(sum(config.ruined for config in configs), len(configs)),
            **_below(means, base),
            "Failed trials, not counted above": str(_failed(study, arm)),
            "Selected": next((config.label.replace(",", ", ") for config in configs if config.selected), "none yet"),
        }
        for name, cell in cells.items():
            rows.setdefault(name, {})[arm] = cell
    counts = {len(configs) for configs in tried.values()}
    notes = [
        "" if len(counts) == 1 else "The arms had unequal budgets: their bests and their spreads are not comparable."
    ]
    heads = columns(study, [Config(arm, "", ()) for arm in tried])
    seeds = plural(len(study.settings.get("tuning_seeds") or []), "tuning seed")
    caption = f"Dev scores over the configs that were tried ({seeds})"
    return build(caption, "Over configs", rows, heads, *notes)


def _base_mean(study: Study) -> float | None:
    rows = study.scores
    dev = rows[(rows["split"] == "dev") & (rows["scorer"] == study.metric) & (rows["arm"] == BASE)]
    mean = dev["score"].mean() if len(dev) else math.nan
    return None if math.isnan(mean) else float(mean)


def _below(means: np.ndarray, base: float | None) -> dict[str, str]:
    """Count the configs that made the base worse: a ruined policy need not repeat itself to be one."""
    return (
        {} if base is None else {f"Below the SFT base ({percent(base)})": _share(int((means < base).sum()), len(means))}
    )


def _share(count: int, total: int) -> str:
    return f"{count} of {total} ({percent(count / total, 0)})"


def _failed(study: Study, arm: str) -> int:
    seeds = study.settings.get("tuning_seeds") or []
    return sum(trial.arm == arm and trial.state == FAILED and trial.seed in seeds for trial in study.trials)


def is_fair(study: Study) -> bool:
    """Return True where the arms of the contrast were tuned with the same number of configs."""
    tried = tried_configs(study)
    contrast = [arm for arm in mapping(dict.fromkeys(study.arms[:2], 1)) if arm in tried]
    return len(contrast) == 2 and len({len(tried[arm]) for arm in contrast}) == 1
