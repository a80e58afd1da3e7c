"""What is said of SimPO against DPO, and what this study measured: each claim holds, does not hold, or was not tested.

Claims of the SimPO paper (arXiv 2405.14734) and of its critics. A claim whose interval leaves both answers open is
undecided: that is not a refutation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from harness.costs import mean_and_range, measured
from harness.family import levels_of, slope_difference
from harness.frames import Table, build
from harness.palette import BASE
from harness.sensitivity import is_fair, tried_configs
from harness.stats import compare
from harness.study import Study, mapping
from harness.wording import interval, levels, percent, points

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
