"""How sure a selection on dev is: dev scores of an arm's configs -> how often resampled ones select another config."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from harness.config.arms import title
from harness.decide.words import percent, plural
from harness.study.decision import SelectionDoubt

RESAMPLES = 1000
_SPREAD = (2.5, 97.5)  # percentiles


def selection_doubts(frame: pd.DataFrame, metric: str, configs: Mapping[str, str]) -> dict[str, SelectionDoubt]:
    """Return how sure the selection of each arm is that has several configs on dev; empty without such an arm.

    Tuning seeds are resampled for each config by itself, dev prompts for all alike, as both were sampled (Efron 1979).

    Args:
        frame: checked scores.
        metric: the scorer that selected.
        configs: the selected config by arm.
    """
    dev = frame[(frame["split"] == "dev") & (frame["scorer"] == metric)]
    found = {}
    for arm, label in configs.items():
        mine = dev[dev["arm"] == arm]
        if mine["config"].nunique() > 1 and label in set(mine["config"]) and "prompt_id" in mine:
            labels, values = _whole(mine, label)
            if values.size:
                found[arm] = _doubt(labels.index(label), label, values)
    return found


def _whole(dev: pd.DataFrame, selected: str) -> tuple[list[str], np.ndarray]:
    """Return the configs with all seeds of the selected one, and their scores, shape (configs, seeds, prompts)."""
    wide = dev.pivot_table(index=["config", "seed"], columns="prompt_id", values="score", aggfunc="mean").astype(float)
    wide = wide.dropna(axis=1)
    seeds = sorted(wide.loc[selected].index)
    labels = [str(label) for label in dict.fromkeys(wide.index.get_level_values(0))]
    whole = [label for label in labels if set(seeds) <= set(wide.loc[label].index)]
    return whole, np.stack([wide.loc[label].loc[seeds].to_numpy() for label in whole])


def _doubt(place: int, label: str, values: np.ndarray) -> SelectionDoubt:
    configs, seeds, prompts = values.shape
    rng = np.random.default_rng(0)
    weights = rng.multinomial(prompts, np.full(prompts, 1 / prompts), RESAMPLES) / prompts
    by_seed = np.einsum("bp,csp->bcs", weights, values)
    of_seeds = rng.multinomial(seeds, np.full(seeds, 1 / seeds), (RESAMPLES, configs)) / seeds
    means = (by_seed * of_seeds).sum(2)
    low, high = np.percentile(means[:, place], _SPREAD)
    return {
        "selected": label,
        "configs": configs,
        "others_selected": float((means.max(1) > means[:, place] + 1e-12).mean()),
        "dev_mean": float(values[place].mean()),
        "dev_ci95": [float(low), float(high)],
        "tuning_seeds": seeds,
    }


def selection_caveats(doubts: Mapping[str, SelectionDoubt]) -> list[str]:
    """Return a sentence on what is compared where configs were selected on dev."""
    if not doubts:
        return []
    return [
        "configs are compared, not methods: how they were selected on dev is not in the interval. "
        + "; ".join(_in_words(arm, one) for arm, one in doubts.items())
    ]


def _in_words(arm: str, doubt: SelectionDoubt) -> str:
    low, high = (percent(end) for end in doubt["dev_ci95"])
    spread = f"the selected one's dev score of {percent(doubt['dev_mean'])} spans {low} to {high}"
    if doubt["configs"] < 2:
        return f"{title(arm)}: only the selected config had all tuning seeds, so that no rival is resampled; {spread}"
    what = "dev prompts" if doubt["tuning_seeds"] < 2 else f"{doubt['tuning_seeds']} tuning seeds and dev prompts"
    return (
        f"{title(arm)}: of {plural(doubt['configs'], 'config')}, another one is selected in "
        f"{percent(doubt['others_selected'], 0)} of {RESAMPLES:,} resamples of {what}; {spread}"
    )
