"""Studies of one family: the same question at several values of one key, such as shares of flipped labels.

Input: the folders beside a study -> output: its siblings' scores by level, and each arm's slope over the levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from harness.frames import Table, build
from harness.records import UsageError
from harness.registration import read_study as read_registration
from harness.scores_file import ArmScores, arm_scores, checked, read_scores, same_prompts
from harness.stats import Components, compare
from harness.study import Study, mapping
from harness.wording import interval, percent, points

LEAST_LEVELS = 3


@dataclass(frozen=True)
class Level:
    """One study of a family: its value, and the golden scores of the two arms that are compared."""

    value: float
    study: str
    arms: dict[str, ArmScores]


def levels_of(study: Study) -> list[Level]:
    """Return the levels of a study's family that are scored, by value, itself among them; not broken siblings."""
    family = mapping(study.settings.get("family"))
    if not family.get("name") or len(study.arms) < 2:
        return []
    found = [level for folder in sorted(study.folder.parent.iterdir()) if (level := _level(folder, family, study))]
    return sorted(found, key=lambda level: level.value)


def _level(folder: Path, family: dict[str, object], study: Study) -> Level | None:
    path = folder / "study.yaml"
    if not path.is_file() or not (folder / "scores.csv").is_file():
        return None
    try:
        registered = read_registration(path)
        theirs = mapping(registered.get("family"))
        if theirs.get("name") != family["name"] or registered["metric"] != study.metric:
            return None
        frame = checked(read_scores(folder / "scores.csv"))
        frame = frame[(frame["split"] == "golden") & (frame["scorer"] == study.metric)]
        arms = {}
        for arm in study.arms[:2]:
            configs = frame[frame["arm"] == arm]["config"].unique()
            arms[arm] = arm_scores(frame, arm, str(configs[0]), None)
        same_prompts(arms)
        return Level(float(theirs["value"]), folder.name, arms)
    except (UsageError, yaml.YAMLError, KeyError, IndexError, TypeError, ValueError, OSError):
        return None


def slope_difference(levels: Sequence[Level]) -> Components:
    """Return the difference of the arms' slopes over the levels, first arm minus second, per unit of the level.

    Each seed and prompt has a least-squares slope over the levels, `sum_k w_k Y_k` with
    `w_k = (x_k - mean x) / sum (x - mean x)**2`; the decision rule's estimator takes these in the place of scores.

    Raises:
        ValueError: for fewer than three levels, or levels with other seeds or prompts.
    """
    if len(levels) < LEAST_LEVELS:
        raise ValueError(f"{len(levels)} of its levels are scored, and a slope wants {LEAST_LEVELS}")
    first = levels[0].arms
    for level in levels[1:]:
        for arm, scores in level.arms.items():
            if (scores.seeds, scores.prompts) != (first[arm].seeds, first[arm].prompts):
                raise ValueError(f"{level.study} has other seeds or golden prompts than {levels[0].study}")
    x = np.array([level.value for level in levels])
    weights = (x - x.mean()) / ((x - x.mean()) ** 2).sum()
    slopes = [
        sum(w * level.arms[arm].values for w, level in zip(weights, levels, strict=True)) for arm in levels[0].arms
    ]
    if any(np.isnan(slope).any() for slope in slopes):
        raise ValueError("some prompts have no score")
    return compare(np.asarray(slopes[0]), np.asarray(slopes[1]), next(iter(first.values())).clusters)


def family_table(study: Study) -> Table | None:
    """Show each level's means and difference; None for a study without a family."""
    levels = levels_of(study)
    if len(levels) < 2:
        return None
    key = str(mapping(study.settings.get("family")).get("key"))
    rows = {}
    for level in levels:
        first, second = (scores.values for scores in level.arms.values())
        here = " (this study)" if level.study == study.folder.name else ""
        name = f"{key}={level.value:g}{here}"
        rows[name] = {arm: percent(np.nanmean(scores.values)) for arm, scores in level.arms.items()}
        if not np.isnan(first).any() and not np.isnan(second).any():
            found = compare(first, second, next(iter(level.arms.values())).clusters)
            rows[name] |= {
                "Difference, points": points(found.difference),
                "95% interval": interval(list(found.interval(0.95))),
            }
    heads = {arm: arm for arm in levels[0].arms}
    return build(f"The same study at other values of {key}", "Study", rows, heads)
