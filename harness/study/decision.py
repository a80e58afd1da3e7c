"""A study's decisions: selection.json (configs), ledger.jsonl (looks at golden), verdict.json; who may see golden."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NotRequired, TypedDict

from harness.study.backup import write_twice
from harness.study.errors import UsageError
from harness.study.files import read_json, read_jsonl, to_json, to_jsonl
from harness.study.registration import read_study

SELECTION_FILE = "selection.json"
LEDGER_FILE = "ledger.jsonl"
VERDICT_FILE = "verdict.json"
_SHOWN = 10  # values of a grid that a warning lists


class SelectedArm(TypedDict):
    """The selected config of one arm, and by config its mean dev score and its number of tuning seeds."""

    selected: str
    dev_means: dict[str, float]
    seeds: dict[str, int]


class Selection(TypedDict, total=False):
    """selection.json; an empty mapping where nothing is selected yet."""

    metric: str
    tuning_seeds: list[int]
    arms: dict[str, SelectedArm]
    selected_at: str


class Look(TypedDict):
    """One row of ledger.jsonl: a look at golden with these runs; `sha256` is the hash of the first three."""

    contrast: list[str]
    seeds: dict[str, list[int]]
    configs: dict[str, list[str]]
    sha256: str
    looked_at: str


class GuardResult(TypedDict):
    """A guard's one-sided test of the arm `of`: passed where the lower bound of its difference is above -margin."""

    metric: str
    margin: float
    of: str
    difference: float
    lower_bound: float
    passed: bool


class RegisteredLook(TypedDict):
    """The look that decided, where looks were registered: seeds per arm, all looks, and alpha over all of them."""

    seeds: int
    registered: list[int]
    alpha: float


class PairResult(TypedDict):
    """The rule on one pair of arms.

    Attributes:
        arms: the difference is the first one's mean minus the second's.
        ci95: its interval at 1 - alpha.
        verdict: as in `Verdict`.
        alpha: the registered contrast's own, or the pair's share of it among the other pairs (Holm 1979).
    """

    arms: list[str]
    difference: float
    ci95: list[float]
    verdict: str
    alpha: float


class AgainstBase(TypedDict):
    """An arm's mean minus the SFT base's, on the same prompts, with its interval at 1 - alpha.

    Attributes:
        collapsed: at least half of the arm's runs have diverged or collapsed.
    """

    difference: float
    ci95: list[float]
    collapsed: bool


class Recommendation(TypedDict):
    """What to ship: an arm, `either` of two that tie, the `base`, or `nothing_yet`; why, and what to do next."""

    ship: str
    why: str
    next: str


class SelectionDoubt(TypedDict):
    """How sure the selection of one arm's config is, by resampled tuning seeds and dev prompts.

    Attributes:
        selected: its label. configs: number of configs with all tuning seeds, among which it was selected.
        others_selected: share of the resamples in which another config is selected.
        dev_mean: its mean dev score. dev_ci95: the middle 95% of that mean over the resamples.
        tuning_seeds: their number; one seed is not resampled, so that only prompts count.
    """

    selected: str
    configs: int
    others_selected: float
    dev_mean: float
    dev_ci95: list[float]
    tuning_seeds: int


class Verdict(TypedDict):
    """verdict.json (DESIGN, sections 2 and 5).

    Attributes:
        verdict: `tie`, `inconclusive`, `trade-off`, or the arm that won.
        level: `method`; `config` where a config was selected on dev; `checkpoint` where an arm has one seed.
        difference: first arm's mean minus the second's, in [-1, 1].
        ci95, ci90: its intervals at 1 - alpha and 1 - 2 alpha, lower and upper end.
        beyond_margin: whether the winner's whole interval lies beyond the margin.
        seed_variance, prompt_variance: variance of the difference by source; V is their sum, or the variance over
            prompts alone where that is larger.
        seed_correlation: of the arms' run means over the seeds that both have; None with fewer than three. The rule
            does not pair seeds.
        minimum_detectable_difference: at these numbers of seeds and prompts.
        to_settle: `seeds` or `prompts` that would detect the margin, None where they cannot; None unless inconclusive.
        rule_version: of the decision rule.
        effective_clusters: (sum n)^2 / sum n^2 over the sizes n of the clusters.
        pairs: every pair of arms, the contrast first. best_set: the arms that none beats.
        against_base: by arm, where the base was scored on the same prompts.
        configs: label by arm. n_seeds, n_unscored, means: by arm. run_means: by arm and seed.
        caveats: facts to read the recommendation with, a sentence each.
        base_mean: of the SFT base on the metric, where it was scored.
        same_as_base: by arm, the share of its golden answers that are the SFT base's own, word for word.
        selection: by arm whose config was selected on dev.
        look: where looks were registered.
        sources: the files of the deciding runs, by arm and seed, where the scores name them.
    """

    verdict: str
    level: str
    difference: float
    ci95: list[float]
    ci90: list[float]
    beyond_margin: bool
    seed_variance: float
    prompt_variance: float
    seed_correlation: float | None
    minimum_detectable_difference: float
    to_settle: dict[str, int | None] | None
    metric: str
    arms: list[str]
    margin: float
    alpha: float
    rule_version: int
    configs: dict[str, str]
    n_prompts: int
    n_clusters: int
    effective_clusters: float
    n_seeds: dict[str, int]
    n_unscored: dict[str, int]
    means: dict[str, float]
    run_means: dict[str, dict[str, float]]
    guards: list[GuardResult]
    pairs: list[PairResult]
    best_set: list[str]
    against_base: dict[str, AgainstBase]
    warnings: list[str]
    reason: str
    caveats: list[str]
    recommendation: Recommendation
    base_mean: NotRequired[float]
    same_as_base: NotRequired[dict[str, float]]
    selection: NotRequired[dict[str, SelectionDoubt]]
    look: NotRequired[RegisteredLook]
    sources: NotRequired[dict[str, dict[str, str]]]


def read_selection(study: Path) -> Selection:
    """Return the contents of selection.json; empty before a selection.

    Raises:
        UsageError: where it is damaged. It cannot simply be made again: golden may have been looked at.
    """
    path = study / SELECTION_FILE
    if not path.is_file():
        return {}
    try:
        found: Selection = read_json(path)
    except ValueError as error:
        raise UsageError(
            f"{error}; it says which configs were selected before golden was looked at: put it back as it was"
        ) from error
    return found


def write_selection(study: Path, selection: Selection) -> None:
    """Write selection.json and its backup copy."""
    write_twice(study / SELECTION_FILE, to_json(selection))


def read_looks(study: Path) -> list[Look]:
    """Return the rows of ledger.jsonl, the looks log; empty before the first look.

    Raises:
        UsageError: where it is damaged.
    """
    path = study / LEDGER_FILE
    if not path.is_file():
        return []
    try:
        return list(read_jsonl(path))
    except ValueError as error:
        raise UsageError(
            f"{error}; it counts the looks at golden: put it back as it was, nothing else mends it"
        ) from error


def write_looks(study: Path, looks: Sequence[Look]) -> None:
    """Write ledger.jsonl and its backup copy."""
    write_twice(study / LEDGER_FILE, to_jsonl(looks))


def golden_problem(study: Path, arm: str, label: str, seed: int) -> str | None:
    """Return why a run must not be scored on golden, or None where it may."""
    path = study / "study.yaml"
    if not path.is_file() or arm not in (registered := read_study(path)).get("tuned", []):
        return None
    if seed in registered["tuning_seeds"]:
        return (
            f"seed={seed}: {study.name} selects its configs with this seed, so that golden would see its luck again; "
            f"golden is for fresh seeds: {', '.join(map(str, registered['seeds'][arm]))}"
        )
    chosen = read_selection(study).get("arms", {}).get(arm)
    if chosen is None:
        return f"{study.name}: no config of {arm} is selected yet; golden is scored for selected configs only"
    if label != chosen["selected"]:
        return (
            f"{arm} {label}: {study.name} has selected {chosen['selected']} on dev, and golden is scored for "
            "selected configs only; give another config a study of its own: study=NAME"
        )
    return None


def edge_warnings(configs: Sequence[str], selected: str) -> list[str]:
    """Return one warning per value of the selected config at an end of its grid, with the next values to try.

    Args:
        configs: labels of all configs of one arm, as `harness.config.trial_id.config_label` writes them.
        selected: the label of the selected config.
    """
    tried: dict[str, set[float]] = {}
    for label in configs:
        for key, value in _label_values(label).items():
            tried.setdefault(key, set()).add(value)
    warnings = []
    for key, value in _label_values(selected).items():
        values = sorted(tried.get(key, ()))
        if len(values) > 1 and value in (values[0], values[-1]):
            end = "smallest" if value == values[0] else "largest"
            some = f"{len(values)} values from {values[0]:g} to {values[-1]:g}"
            shown = some if len(values) > _SHOWN else ", ".join(f"{v:g}" for v in values)
            beyond = " and ".join(f"{v:g}" for v in _next_values(values if value == values[-1] else values[::-1]))
            more = f"try {beyond} too" if beyond else "it cannot be lower"
            warnings.append(
                f"{key}={value:g} was selected and is the {end} that was tried ({shown}): the best may lie beyond "
                f"the grid; {more}, in a new study"
            )
    return warnings


def _next_values(values: Sequence[float]) -> list[float]:
    """Return the next two values at the end of a grid: in equal ratios, or in equal steps where a zero is in it."""
    last, before = values[-1], values[-2]
    if min(values) > 0:
        found = [last * (last / before) ** n for n in (1, 2)]
    else:
        found = [last + n * (last - before) for n in (1, 2)]
    return [value for value in found if value >= 0]


def _label_values(label: str) -> dict[str, float]:
    return {key: float(value) for key, _, value in (part.partition("=") for part in label.split(",")) if value}
