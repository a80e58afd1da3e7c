"""Claims of the SimPO paper (arXiv 2405.14734) and of its critics, tested on a study of SimPO against DPO.

Each claim holds, does not hold, is undecided or was not tested. An interval that leaves both answers open is undecided:
that is not a refutation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from harness.config.arms import BASE
from harness.decide.stats import compare
from harness.decide.words import difference, interval, percent, points
from harness.report.effects import CONFIDENCE, levels_of, slope_difference
from harness.report.facts import TrainingCost, mean_and_range, training_costs
from harness.report.search import is_fair, tried_configs
from harness.report.study import Study
from harness.report.tables import Table, build
from harness.study.files import mapping
from harness.study.registration import CONTRAST

HOLDS, FAILS, UNDECIDED, UNTESTED = "holds", "does not hold", "undecided", "not tested"
_LEAST_CONFIGS = 4  # to compare two spreads
_ALIKE = 0.02  # costs and lengths closer than this relative difference are alike
_REFERENCE_MODES = {
    "separate": "with a separate reference model",
    "adapter_off": "with the reference by switching the adapter off",
    "cached": "with cached reference log-probs",
}


@dataclass(frozen=True)
class Claim:
    """A claim with its status; `figure` is the measurement with its interval, or the reason for none."""

    claim: str
    status: str
    figure: str


def claims(study: Study) -> list[Claim]:
    """Test the claims on a study whose contrast is SimPO against DPO; an empty list for any other."""
    if tuple(study.arms[:2]) != CONTRAST:
        return []
    return [
        _wins(study),
        *_costs_less(study),
        _answers_shorter(study),
        _is_sensitive(study),
        _is_less_robust(study),
        *_loses_abilities(study),
    ]


def claims_table(study: Study) -> Table | None:
    """Show the claims; None for a study of other arms."""
    rows = {one.claim: {"Here it": one.status, "Measured": one.figure} for one in claims(study)}
    return build("What is said of SimPO against DPO, and what this study found", "SimPO …", rows, {}) if rows else None


def _wins(study: Study) -> Claim:
    claim, verdict = "wins on golden", study.verdict
    if not verdict:
        return Claim(claim, UNTESTED, "no verdict yet")
    figure = f"{difference(verdict)}: {verdict.get('verdict')}"
    if verdict.get("level") == "checkpoint":
        figure += "; of these two checkpoints, not of the methods"
    known = {"simpo": HOLDS, "dpo": FAILS, "tie": FAILS, "trade-off": FAILS}
    return Claim(claim, known.get(str(verdict.get("verdict")), UNDECIDED), figure)


def _costs_less(study: Study) -> list[Claim]:
    costs = training_costs(study)
    sides = [
        (words, costs.get(CONTRAST[0], []), costs.get(f"{CONTRAST[1]}-{mode}", []))
        for mode, words in _REFERENCE_MODES.items()
    ]
    return [
        *(_costs_less_than(f"needs less memory than DPO {words}", "GB", *pair) for words, *pair in sides),
        *(_costs_less_than(f"trains faster than DPO {words}", "s", *pair) for words, *pair in sides),
    ]


def _costs_less_than(claim: str, unit: str, ours: Sequence[TrainingCost], theirs: Sequence[TrainingCost]) -> Claim:
    """Compare the memory (unit `GB`) or the seconds (unit `s`) of two sides."""
    if not ours or not theirs:
        return Claim(claim, UNTESTED, "no such trial; measure_costs=true trains one")
    for fact in ours[0].conditions:
        if {one.conditions[fact] for one in ours} != {one.conditions[fact] for one in theirs}:
            return Claim(claim, UNTESTED, f"the trials differ in {fact}")
    measured = [[one.memory_bytes if unit == "GB" else one.seconds for one in side] for side in (ours, theirs)]
    values = [[value for value in side if value] for side in measured]
    if not all(values):
        return Claim(claim, UNTESTED, "it was not measured")
    ratio = float(np.mean(values[0]) / np.mean(values[1]))
    scale = 1e9 if unit == "GB" else 1.0
    figure = f"{mean_and_range(values[0], scale)} against {mean_and_range(values[1], scale)} {unit}: {ratio:.2f} times"
    reference = [one.reference_seconds for one in theirs if one.reference_seconds]
    if unit == "s" and reference:
        figure += f"; DPO's reference pass took {max(reference):.1f} s once"
    if abs(ratio - 1) <= _ALIKE:
        return Claim(claim, FAILS, f"{figure}, no difference that matters")
    return Claim(claim, HOLDS if ratio < 1 else FAILS, figure)


def _answers_shorter(study: Study) -> Claim:
    claim = "answers shorter at equal or better quality"
    arrays = [_answer_lengths(study, arm) for arm in CONTRAST]
    if any(array is None for array in arrays) or not study.verdict:
        return Claim(claim, UNTESTED, "no completions of both arms with a verdict")
    first, second = (array for array in arrays if array is not None)
    if first.shape[1] != second.shape[1] or first.shape[1] < 2:
        return Claim(claim, UNTESTED, "the arms answered different prompts")
    found = compare(first, second)
    low, high = found.interval(CONFIDENCE)
    figure = (
        f"{_signed(found.difference)} tokens an answer, 95% {_signed(low)} to {_signed(high)} "
        f"({first.mean():.1f} against {second.mean():.1f})"
    )
    if max(abs(low), abs(high)) <= _ALIKE * second.mean():
        return Claim(claim, FAILS, f"{figure}, no difference that matters")
    verdict = str(study.verdict.get("verdict"))
    if low > 0 or verdict == CONTRAST[1]:
        return Claim(claim, FAILS, figure)
    is_open = high >= 0 or verdict not in ("tie", CONTRAST[0])
    return Claim(claim, UNDECIDED if is_open else HOLDS, figure)


def _signed(value: float) -> str:
    text = f"{value:+.2f}"
    return text.replace("-", "−") if float(text) else "0.00"


def _answer_lengths(study: Study, arm: str) -> np.ndarray | None:
    """Return the lengths in tokens of an arm's answers on the shown split, shape (num_seeds, num_prompts)."""
    config = next((config for config in study.configs if config.arm == arm), None)
    rows = []
    for trial in config.trials if config else ():
        answers = {str(row["prompt_id"]): row["tokens"] for row in study.completions(trial)}
        if not answers or None in answers.values():
            return None
        rows.append([answers[prompt] for prompt in sorted(answers)])
    return np.array(rows, dtype=float) if rows and len({len(row) for row in rows}) == 1 else None


def _is_sensitive(study: Study) -> Claim:
    """Compare absolute deviations from the arms' medians by Welch's interval (Brown and Forsythe 1974)."""
    claim = "is more sensitive to its hyperparameters"
    tried = tried_configs(study)
    if not all(len(tried.get(arm, ())) >= _LEAST_CONFIGS for arm in CONTRAST):
        return Claim(claim, UNTESTED, f"fewer than {_LEAST_CONFIGS} configs of each arm were tried")
    if not is_fair(study):
        return Claim(claim, UNTESTED, "the arms had unequal budgets")
    means = [np.array([config.mean for config in tried[arm]]) for arm in CONTRAST]
    away = [np.abs(values - np.median(values)) for values in means]
    test = stats.ttest_ind(*away, equal_var=False)
    low, high = test.confidence_interval(CONFIDENCE)
    spread = " against ".join(points(values.std(ddof=1), signed=False) for values in means)
    ruined = " against ".join(percent(float(np.mean([config.ruined for config in tried[arm]])), 0) for arm in CONTRAST)
    figure = (
        f"standard deviation over configs {spread} points; "
        f"mean deviation {points(away[0].mean() - away[1].mean())} points, "
        f"95% {interval([low, high])}; collapsed {ruined} of the configs"
    )
    return Claim(claim, HOLDS if low > 0 else FAILS if high < 0 else UNDECIDED, figure)


def _is_less_robust(study: Study) -> Claim:
    claim = "is less robust to wrong labels"
    family = mapping(study.settings.get("family"))
    if family.get("key") != "data.label_noise":
        return Claim(claim, UNTESTED, "one share of wrong labels; +sweep=noise trains several")
    levels = levels_of(study)
    try:
        found = slope_difference(levels)
    except ValueError as error:
        return Claim(claim, UNTESTED, str(error))
    low, high = (bound / 10 for bound in found.interval(CONFIDENCE))
    each = " and ".join(
        points(float(np.polyfit([x.value for x in levels], [x.arms[a].values.mean() for x in levels], 1)[0]) / 10)
        for a in CONTRAST
    )
    figure = (
        f"points for each 10% of labels flipped: {each}; difference {points(found.difference / 10)}, "
        f"95% {interval([low, high])}"
    )
    return Claim(claim, HOLDS if high < 0 else FAILS if low > 0 else UNDECIDED, figure)


def _loses_abilities(study: Study) -> list[Claim]:
    registered = study.settings.get("guards")
    guards = [mapping(guard).get("metric") for guard in registered] if isinstance(registered, list) else []
    if not guards:
        return [Claim("loses more of other abilities", UNTESTED, "no guard is registered; decide.guards names them")]
    return [_loses_ability(study, str(guard)) for guard in guards]


def _loses_ability(study: Study, guard: str) -> Claim:
    claim = f"loses more of other abilities: {guard}"
    first, second, base = (_complete_scores(study, arm, guard) for arm in (*CONTRAST, BASE))
    if first is None or second is None or first.shape[1] != second.shape[1]:
        return Claim(claim, UNTESTED, "the guard has no scores of both arms on the same prompts")
    found = compare(first, second)
    ends = found.interval(CONFIDENCE)
    figure = f"SimPO minus DPO {points(found.difference)} points, 95% {interval(ends)}"
    if base is not None and base.shape[1] == first.shape[1]:
        against = compare(first, base)
        shown = interval(against.interval(CONFIDENCE))
        figure += f"; minus the SFT base {points(against.difference)}, 95% {shown} (over prompts: the base is one run)"
    return Claim(claim, HOLDS if ends[1] < 0 else FAILS if ends[0] > 0 else UNDECIDED, figure)


def _complete_scores(study: Study, arm: str, scorer: str) -> np.ndarray | None:
    """Return an arm's scores on the shown split, shape (num_seeds, num_prompts); None where any are missing."""
    config = next((config for config in study.with_base if config.arm == arm), None)
    scores = study.arm_scores(config, scorer) if config else None
    return None if scores is None or np.isnan(scores.values).any() else scores.values
