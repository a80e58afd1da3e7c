"""Effects over several studies or arms: the difference at each level of a family, and the ingredients' main effects.

Estimated by the decision rule's own variance (`harness.decide.stats`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from harness.config.arms import ARMS, Arm
from harness.decide.deciding import deciding_scores
from harness.decide.notes import without_bad_scorers
from harness.decide.scores_file import ArmScores, arm_scores, checked, read_scores, same_prompts
from harness.decide.stats import Components, compare, contrast
from harness.decide.words import interval, percent, points
from harness.report.study import Study
from harness.report.tables import Table, build
from harness.study.errors import UsageError
from harness.study.files import Json, mapping, number
from harness.study.registration import read_study as read_registration

LEAST_LEVELS = 3  # for a slope
_LEAST_ARMS = 4  # for main effects
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Level:
    """One study of a family: its value, and the golden scores of the two arms that are compared."""

    value: float
    study: str
    arms: dict[str, ArmScores]


def levels_of(study: Study) -> list[Level]:
    """Return the scored studies of this family, this one included, sorted by value; unreadable ones are skipped."""
    family = mapping(study.settings.get("family"))
    if not family.get("name") or len(study.arms) < 2:
        return []
    found = [level for folder in sorted(study.folder.parent.iterdir()) if (level := _level(folder, family, study))]
    return sorted(found, key=lambda level: level.value)


def _level(folder: Path, family: Mapping[str, Json], study: Study) -> Level | None:
    path = folder / "study.yaml"
    if not path.is_file() or not (folder / "scores.csv").is_file():
        return None
    try:
        registered = read_registration(path)
        theirs = mapping(registered.get("family"))
        value = number(theirs.get("value"))
        if theirs.get("name") != family["name"] or registered["metric"] != study.metric or value is None:
            return None
        frame = checked(without_bad_scorers(read_scores(folder / "scores.csv"), [study.metric])[0])
        return Level(value, folder.name, deciding_scores(frame, study.metric, study.arms[:2]).arms)
    except (UsageError, yaml.YAMLError, OSError):
        return None


def slope_difference(levels: Sequence[Level]) -> Components:
    """Return the difference of the arms' slopes over the levels, first arm minus second, per unit of the level.

    Each seed and prompt has a least-squares slope over the levels, `sum_k w_k Y_k` with
    `w_k = (x_k - mean x) / sum (x - mean x)**2`; the decision rule's estimator takes the slopes in place of scores.

    Raises:
        ValueError: fewer than three levels, levels with other seeds or prompts, or unscored prompts.
    """
    if len(levels) < LEAST_LEVELS:
        raise ValueError(f"{len(levels)} of its levels are scored, and a slope needs {LEAST_LEVELS}")
    first = levels[0].arms
    for level in levels[1:]:
        for arm, scores in level.arms.items():
            if (scores.seeds, scores.prompts) != (first[arm].seeds, first[arm].prompts):
                raise ValueError(f"{level.study} has other seeds or golden prompts than {levels[0].study}")
    x = np.array([level.value for level in levels])
    weights = (x - x.mean()) / ((x - x.mean()) ** 2).sum()
    slopes = [np.tensordot(weights, np.stack([level.arms[arm].values for level in levels]), axes=1) for arm in first]
    if any(np.isnan(slope).any() for slope in slopes):
        raise ValueError("some prompts have no score")
    return compare(slopes[0], slopes[1], next(iter(first.values())).clusters)


def family_table(study: Study) -> Table | None:
    """Show each level's means and difference; None for a study without a family."""
    levels = levels_of(study)
    if len(levels) < 2:
        return None
    key = str(mapping(study.settings.get("family")).get("key"))
    rows = {}
    for level in levels:
        first, second = level.arms.values()
        here = " (this study)" if level.study == study.folder.name else ""
        name = f"{key}={level.value:g}{here}"
        rows[name] = {arm: percent(float(np.nanmean(scores.values))) for arm, scores in level.arms.items()}
        if not np.isnan(first.values).any() and not np.isnan(second.values).any():
            found = compare(first.values, second.values, first.clusters)
            rows[name] |= {
                "Difference, points": points(found.difference),
                "95% interval": interval(found.interval(CONFIDENCE)),
            }
    heads = {arm: arm for arm in levels[0].arms}
    return build(f"The same study at other values of {key}", "Study", rows, heads)


@dataclass(frozen=True)
class Ingredient:
    """One part of SimPO.

    Attributes:
        name: in prose.
        key: attribute of `harness.config.arms.Arm`.
        flipped: True where SimPO's form is the attribute's False.
    """

    name: str
    key: str
    flipped: bool = False

    def has(self, arm: Arm) -> bool:
        """Return True where the arm has SimPO's form of this part."""
        return bool(getattr(arm, self.key)) is not self.flipped


INGREDIENTS = (
    Ingredient("No reference model", "uses_reference", flipped=True),
    Ingredient("Mean over tokens instead of the sum", "per_token"),
    Ingredient("Target margin", "has_margin"),
)


def effects(scores: Mapping[str, np.ndarray], clusters: np.ndarray | None = None) -> dict[str, tuple[int, Components]]:
    """Return each ingredient's number of matched pairs of arms and its main effect over them.

    Args:
        scores: by arm, shape (num_seeds, num_prompts), the prompts in the same order.
        clusters: label of each prompt; None makes each prompt a cluster.

    An ingredient without two arms that differ in it alone has no entry.
    """
    found = {}
    forms = {tuple(one.has(ARMS[arm]) for one in INGREDIENTS): arm for arm in scores if arm in ARMS}
    for place, ingredient in enumerate(INGREDIENTS):
        pairs = [
            (arm, forms[other])
            for form, arm in forms.items()
            if form[place] and (other := (*form[:place], False, *form[place + 1 :])) in forms
        ]
        if pairs:
            arms = [scores[arm] for pair in pairs for arm in pair]
            weights = [sign / len(pairs) for _ in pairs for sign in (1.0, -1.0)]
            found[ingredient.name] = (len(pairs), contrast(arms, weights, clusters))
    return found


def ingredient_table(study: Study) -> Table | None:
    """Show the main effects of a study with arms of the ablation; None with fewer than four arms or without scores."""
    frame = study.confirmed
    scored = set(frame[frame["scorer"] == study.metric]["arm"])
    arms = [arm for arm in study.arms if arm in ARMS and arm in scored]
    if len(arms) < _LEAST_ARMS:
        return None
    try:
        scores = _scores_by_arm(study, arms)
        found = effects({arm: one.values for arm, one in scores.items()}, next(iter(scores.values())).clusters)
    except ValueError:  # unscored or unequal prompts: the verdict names them
        return None
    rows = {}
    for name, (pairs, components) in found.items():
        low, high = components.interval(CONFIDENCE)
        rows[name] = {
            "Effect, points": points(components.difference),
            "95% interval": interval((low, high)),
            "Pairs of arms": str(pairs),
            "Reading": "helps" if low > 0 else "hurts" if high < 0 else "not told from noise",
        }
    note = (
        "Main effects over arms that are alike in the other parts, each arm at its own config. Three questions of one "
        "family: at 95% each, about one in seven such tables shows an effect that is not there."
    )
    caption = f"Which part of SimPO makes the difference, on {study.metric}"
    return build(caption, "Part", rows, {}, note) if rows else None


def _scores_by_arm(study: Study, arms: Sequence[str]) -> dict[str, ArmScores]:
    """Lay the scores of the metric out by arm.

    Raises:
        ValueError: an arm with several configs, unequal prompts, or a prompt without a score.
    """
    frame = checked(study.confirmed[study.confirmed["scorer"] == study.metric])
    found = {}
    for arm in arms:
        configs = frame[frame["arm"] == arm]["config"].unique()
        if len(configs) != 1:
            raise ValueError(f"{arm} has {len(configs)} configs")
        found[arm] = arm_scores(frame, arm, str(configs[0]))
    same_prompts(found)
    if any(np.isnan(one.values).any() for one in found.values()):
        raise ValueError("prompts without a score")
    return found
