"""Which ingredient of SimPO makes the difference: main effects over the arms of an ablation, with intervals.

Every arm has or lacks a reference, the mean over tokens, and a target margin (`harness.arms`). An ingredient's main
effect is the mean score of the arms with it minus that of the arms without it, over arms alike in the other two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from harness.arms import ARMS, Arm
from harness.frames import Table, build
from harness.scores_file import arm_scores, checked, same_prompts
from harness.stats import Components, contrast
from harness.study import Study
from harness.wording import interval, points


@dataclass(frozen=True)
class Ingredient:
    """One part of SimPO: `has` says whether an arm has it."""

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
        clusters: of the prompts, or None.

    An ingredient without two arms that differ in it alone has none.
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
    frame = frame[(frame["scorer"] == study.metric) & (frame["split"] == study.split)]
    arms = [arm for arm in study.arms if arm in ARMS and (frame["arm"] == arm).any()]
    if len(arms) < 4:
        return None
    try:
        found = effects(*_arrays(frame, arms))
    except ValueError:  # unscored or unequal prompts: the verdict says which
        return None
    rows = {}
    for name, (pairs, components) in found.items():
        ends = components.interval(0.95)
        rows[name] = {
            "Effect, points": points(components.difference),
            "95% interval": interval(list(ends)),
            "Pairs of arms": str(pairs),
            "Reading": "helps" if ends[0] > 0 else "hurts" if ends[1] < 0 else "not told from noise",
        }
    note = (
        "Main effects over arms that are alike in the other parts, each arm at its own config. Three questions of one "
        "family: at 95% each, about one in seven such tables shows an effect that is not there."
    )
    caption = f"Which part of SimPO makes the difference, on {study.metric}"
    return build(caption, "Part", rows, {}, note) if rows else None


def _arrays(frame: pd.DataFrame, arms: list[str]) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """Lay the scores out by arm; raises ValueError where an arm has several configs or prompts without a score."""
    clean = checked(frame)
    found = {}
    for arm in arms:
        configs = clean[clean["arm"] == arm]["config"].unique()
        if len(configs) != 1:
            raise ValueError(f"{arm} has {len(configs)} configs")
        found[arm] = arm_scores(clean, arm, str(configs[0]), None)
    same_prompts(found)
    if any(np.isnan(one.values).any() for one in found.values()):
        raise ValueError("prompts without a score")
    return {arm: one.values for arm, one in found.items()}, next(iter(found.values())).clusters
