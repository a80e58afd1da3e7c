"""What is said of SimPO against DPO, and what this study measured: each claim holds, does not hold, or was not tested.

Claims of the SimPO paper (arXiv 2405.14734) and of its critics. A claim whose interval leaves both answers open is
undecided: that is not a refutation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from scipy import stats

from harness.config.arms import ARMS, BASE, Arm
from harness.decide.scores_file import ArmScores, arm_scores, checked, read_scores, same_prompts
from harness.decide.stats import Components, compare, contrast
from harness.report.facts import mean_and_range, measured
from harness.report.search import is_fair, tried_configs
from harness.report.study import Study
from harness.report.tables import Table, build
from harness.report.words import interval, levels, percent, points
from harness.study.errors import UsageError
from harness.study.files import mapping
from harness.study.registration import read_study as read_registration

HOLDS, FAILS, UNDECIDED, UNTESTED = "holds", "does not hold", "undecided", "not tested"
PAIR = ("simpo", "dpo")
_LEAST_CONFIGS = 4  # to compare two spreads
_ALIKE = 0.02  # costs and lengths closer than this are alike
_WAYS = {
    "separate": "with a separate reference model",
    "adapter_off": "with the reference by switching the adapter off",
    "cached": "with cached reference log-probs",
}


@dataclass(frozen=True)
class Claim:
    """A claim and what became of it: `figure` is what was measured, with its interval, or why nothing was."""

    claim: str
    status: str
    figure: str


def claims(study: Study) -> list[Claim]:
    """Test the claims on a study whose contrast is SimPO against DPO; an empty list for any other."""
    if tuple(study.arms[:2]) != PAIR:
        return []
    return [
        _wins(study),
        *_costs(study),
        _shorter(study),
        _sensitive(study),
        _noise(study),
        *_taxes(study),
    ]


def claims_table(study: Study) -> Table | None:
    """Show the claims."""
    rows = {one.claim: {"Here it": one.status, "Measured": one.figure} for one in claims(study)}
    return build("What is said of SimPO against DPO, and what this study found", "SimPO …", rows, {}) if rows else None


def _wins(study: Study) -> Claim:
    claim, verdict = "wins on golden", study.verdict
    if not verdict:
        return Claim(claim, UNTESTED, "no verdict yet")
    found = f"{levels(study)[0]} {interval(verdict.get('ci95'))}: {verdict.get('verdict')}"
    figure = f"{points(verdict.get('difference'))} points, {found}"
    if verdict.get("level") == "checkpoint":
        figure += "; of these two checkpoints, not of the methods"
    known = {"simpo": HOLDS, "dpo": FAILS, "tie": FAILS, "trade-off": FAILS}
    return Claim(claim, known.get(str(verdict.get("verdict")), UNDECIDED), figure)


def _costs(study: Study) -> list[Claim]:
    found = measured(study)
    rows = []
    for claim, key in (("needs less memory than DPO", "memory"), ("trains faster than DPO", "seconds")):
        for way, words in _WAYS.items():
            rows.append(_cost(f"{claim} {words}", key, found.get("simpo"), found.get(f"dpo-{way}")))
    return rows


def _cost(
    claim: str, key: str, ours: Sequence[Mapping[str, Any]] | None, theirs: Sequence[Mapping[str, Any]] | None
) -> Claim:
    if not ours or not theirs:
        return Claim(claim, UNTESTED, "no such trial; measure_costs=true trains one")
    for fact in ("engine", "hardware", "tokens"):
        if {str(one[fact]) for one in ours} != {str(one[fact]) for one in theirs}:
            return Claim(claim, UNTESTED, f"the trials differ in {fact}")
    values = [[one[key] for one in side if one[key]] for side in (ours, theirs)]
    if not all(values):
        return Claim(claim, UNTESTED, "it was not measured")
    ratio = float(np.mean(values[0]) / np.mean(values[1]))
    unit, scale = ("GB", 1e9) if key == "memory" else ("s", 1.0)
    figure = f"{mean_and_range(values[0], scale)} against {mean_and_range(values[1], scale)} {unit}: {ratio:.2f} times"
    reference = [one["reference_seconds"] for one in theirs if one["reference_seconds"]]
    if key == "seconds" and reference:
        figure += f"; DPO's reference pass took {max(reference):.1f} s once"
    if abs(ratio - 1) <= _ALIKE:
        return Claim(claim, FAILS, f"{figure}, no difference that matters")
    return Claim(claim, HOLDS if ratio < 1 else FAILS, figure)


def _shorter(study: Study) -> Claim:
    claim = "answers shorter at equal or better quality"
    arrays = [_lengths(study, arm) for arm in PAIR]
    if any(array is None for array in arrays) or not study.verdict:
        return Claim(claim, UNTESTED, "no completions of both arms with a verdict")
    first, second = (array for array in arrays if array is not None)
    if first.shape[1] != second.shape[1] or first.shape[1] < 2:
        return Claim(claim, UNTESTED, "the arms answered different prompts")
    found = compare(first, second)
    low, high = found.interval(0.95)
    figure = (
        f"{_signed(found.difference)} tokens an answer, 95% {_signed(low)} to {_signed(high)} "
        f"({first.mean():.1f} against {second.mean():.1f})"
    )
    if max(abs(low), abs(high)) <= _ALIKE * second.mean():
        return Claim(claim, FAILS, f"{figure}, no difference that matters")
    verdict = str(study.verdict.get("verdict"))
    if low > 0 or verdict == PAIR[1]:
        return Claim(claim, FAILS, figure)
    is_open = high >= 0 or verdict not in ("tie", PAIR[0])
    return Claim(claim, UNDECIDED if is_open else HOLDS, figure)


def _signed(value: float) -> str:
    text = f"{value:+.2f}"
    return text.replace("-", "−") if float(text) else "0.00"


def _lengths(study: Study, arm: str) -> np.ndarray | None:
    """Return lengths in tokens of an arm's answers on the shown split, shape (seeds, prompts)."""
    config = next((config for config in study.configs if config.arm == arm), None)
    rows = []
    for trial in config.trials if config else ():
        answers = {str(row["prompt_id"]): row["tokens"] for row in study.completions(trial)}
        if not answers or None in answers.values():
            return None
        rows.append([answers[prompt] for prompt in sorted(answers)])
    return np.array(rows, dtype=float) if rows and len({len(row) for row in rows}) == 1 else None


def _sensitive(study: Study) -> Claim:
    """Brown and Forsythe 1974: compare absolute deviations from the arms' medians, by Welch's interval."""
    claim = "is more sensitive to its hyperparameters"
    tried = tried_configs(study)
    if not all(len(tried.get(arm, ())) >= _LEAST_CONFIGS for arm in PAIR):
        return Claim(claim, UNTESTED, f"fewer than {_LEAST_CONFIGS} configs of each arm were tried")
    if not is_fair(study):
        return Claim(claim, UNTESTED, "the arms had unequal budgets")
    means = [np.array([config.mean for config in tried[arm]]) for arm in PAIR]
    away = [np.abs(values - np.median(values)) for values in means]
    test = stats.ttest_ind(*away, equal_var=False)
    low, high = test.confidence_interval(0.95)
    spread = " against ".join(points(values.std(ddof=1), signed=False) for values in means)
    ruined = " against ".join(percent(np.mean([config.ruined for config in tried[arm]]), 0) for arm in PAIR)
    figure = (
        f"standard deviation over configs {spread} points; "
        f"mean deviation {points(away[0].mean() - away[1].mean())} points, "
        f"95% {interval([low, high])}; collapsed {ruined} of the configs"
    )
    return Claim(claim, HOLDS if low > 0 else FAILS if high < 0 else UNDECIDED, figure)


def _noise(study: Study) -> Claim:
    claim = "is less robust to wrong labels"
    family = mapping(study.settings.get("family"))
    if family.get("key") != "data.label_noise":
        return Claim(claim, UNTESTED, "one share of wrong labels; +sweep=noise trains several")
    levels = levels_of(study)
    try:
        found = slope_difference(levels)
    except ValueError as error:
        return Claim(claim, UNTESTED, str(error))
    low, high = (bound / 10 for bound in found.interval(0.95))
    each = " and ".join(
        points(float(np.polyfit([x.value for x in levels], [x.arms[a].values.mean() for x in levels], 1)[0]) / 10)
        for a in PAIR
    )
    figure = (
        f"points for each 10% of labels flipped: {each}; difference {points(found.difference / 10)}, "
        f"95% {interval([low, high])}"
    )
    return Claim(claim, HOLDS if high < 0 else FAILS if low > 0 else UNDECIDED, figure)


def _taxes(study: Study) -> list[Claim]:
    guards = [mapping(guard).get("metric") for guard in study.settings.get("guards") or []]
    if not guards:
        return [Claim("loses more of other abilities", UNTESTED, "no guard is registered; decide.guards names them")]
    return [_tax(study, str(guard)) for guard in guards]


def _tax(study: Study, guard: str) -> Claim:
    claim = f"loses more of other abilities: {guard}"
    arrays = {arm: _scores(study, arm, guard) for arm in (*PAIR, BASE)}
    first, second, base = (arrays[arm] for arm in (*PAIR, BASE))
    if first is None or second is None or first.shape[1] != second.shape[1]:
        return Claim(claim, UNTESTED, "the guard has no scores of both arms on the same prompts")
    found = compare(first, second)
    ends = found.interval(0.95)
    figure = f"SimPO minus DPO {points(found.difference)} points, 95% {interval(list(ends))}"
    if base is not None and base.shape[1] == first.shape[1]:
        against = compare(first, base)
        shown = interval(list(against.interval(0.95)))
        figure += f"; minus the SFT base {points(against.difference)}, 95% {shown} (over prompts: the base is one run)"
    return Claim(claim, HOLDS if ends[1] < 0 else FAILS if ends[0] > 0 else UNDECIDED, figure)


def _scores(study: Study, arm: str, scorer: str) -> np.ndarray | None:
    """Return an arm's confirmed scores by one scorer, shape (seeds, prompts); None where some are missing."""
    rows = study.confirmed
    rows = rows[(rows["arm"] == arm) & (rows["scorer"] == scorer)]
    if rows.empty or rows.duplicated(["seed", "prompt_id"]).any():
        return None
    table = rows.pivot(index="seed", columns="prompt_id", values="score")
    return None if table.isna().to_numpy().any() else table.to_numpy(float)


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
