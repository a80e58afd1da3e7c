"""The decision rule: scores in long form -> the contents of verdict.json (DESIGN, section 5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pandas as pd

from harness.decide.copies import drop_copies
from harness.decide.deciding import (
    components_of_arms,
    confirmed,
    decide_interval,
    deciding_scores,
    laid_out,
    paired,
)
from harness.decide.doubts import doubts, seed_correlation
from harness.decide.planning import needed
from harness.decide.ranking import (
    WORDS,
    arms_against_base,
    best_set,
    other_pairs,
    pair_result,
    rankable,
    within_range,
)
from harness.decide.recommend import recommend
from harness.decide.scores_file import ArmScores, checked, choose_metric, prompts_behind
from harness.decide.selection import selection_caveats, selection_doubts
from harness.decide.stats import Components
from harness.decide.words import reason
from harness.study.decision import GuardResult, Verdict
from harness.study.errors import UsageError
from harness.study.registration import ALPHA, CONTRAST, MARGIN, RULE_VERSION, Guard


class Basis(NamedTuple):
    """What a verdict rests on.

    Attributes:
        frame: the checked scores without copies.
        metric: the scorer that decides.
        configs: the deciding config of each arm of the contrast; `others` of the arms beside it.
        runs: scores of the contrast; `kept` without prompts that are unscored in any run.
        found: components of the difference.
        num_prompts: prompts behind each score, where a run has one score and their number is known.
        warnings: of copies, selection, ranking and unscored prompts.
    """

    frame: pd.DataFrame
    metric: str
    configs: dict[str, str]
    others: dict[str, str]
    runs: dict[str, ArmScores]
    kept: dict[str, ArmScores]
    found: Components
    num_prompts: int | None
    warnings: list[str]


def verdict(
    scores: pd.DataFrame,
    *,
    metric: str | None = None,
    margin: float = MARGIN,
    alpha: float = ALPHA,
    arms: tuple[str, str] = CONTRAST,
    cluster: str | None = None,
    guards: Sequence[Guard] = (),
    others: Sequence[str] | None = None,
) -> Verdict:
    """Apply the decision rule to scores in long form.

    Args:
        scores: columns `arm, seed, score`, optionally `config, split, prompt_id, scorer, cluster, unscored_reason,
            stage, flag`; scores in [0, 1], higher is better. `n_prompts`: prompts behind each score, where a run has
            one; `answers_sha256`: hash of a run's answers, by which copies are found.
        metric: the scorer to decide on; may be left out where there is only one.
        margin: the smallest difference that matters, in (0, 1).
        alpha: error rate; `ci95` is the interval at 1 - alpha and `ci90` at 1 - 2 alpha.
        arms: the difference is the first arm's mean minus the second's.
        cluster: column with the prompts' clusters, if it is not `cluster`.
        guards: second metrics on which the winner must not be worse than the other arm by the guard's margin.
        others: arms that are ranked beside the two; None for all that the scores hold.

    Returns:
        The contents of verdict.json.

    Raises:
        UsageError: scores that cannot be compared; the message names arm, seed and prompt.
    """
    on = basis(scores, metric=metric, arms=arms, cluster=cluster, others=others)
    found, kept = on.found, on.kept
    word, winner = decide_interval(found, arms=arms, margin=margin, alpha=alpha)
    n_unscored = {name: int(np.isnan(arm.values).sum()) for name, arm in on.runs.items()}
    warnings = [*on.warnings, *doubts(kept, found, on.num_prompts)]
    if any(n_unscored.values()):
        warnings += _bound_warnings(on, word, arms=arms, margin=margin, alpha=alpha)
    tested = [_test_guard(on, guard, winner, arms, cluster, alpha) for guard in guards]
    failed = [guard for guard in tested if winner and not guard["passed"]]
    word = "trade-off" if failed else word

    def is_failed(pair: tuple[str, str], ahead: str) -> bool:
        try:
            return not all(_test_guard(on, guard, ahead, pair, cluster, alpha)["passed"] for guard in guards)
        except UsageError:
            return True  # an arm beside the contrast that the guard's metric has not scored

    everyone = [*arms, *on.others]
    pairs = [pair_result(arms, found, word, alpha)]
    pairs += other_pairs(
        on.frame,
        on.metric,
        everyone,
        margin=margin,
        alpha=alpha,
        cluster=cluster,
        num_prompts=on.num_prompts,
        is_failed=is_failed,
    )
    wide, narrow = found.interval(1 - alpha), found.interval(1 - 2 * alpha)
    doubted = selection_doubts(on.frame, on.metric, on.configs)
    result: Verdict = {
        "verdict": word,
        "level": "checkpoint" if min(found.num_seeds) < 2 else "config" if doubted else "method",
        "difference": found.difference,
        "ci95": within_range(wide),
        "ci90": within_range(narrow),
        "beyond_margin": bool(winner and min(abs(wide[0]), abs(wide[1])) > margin),
        "seed_variance": found.seed_variance,
        "prompt_variance": found.prompt_variance,
        "seed_correlation": seed_correlation(kept),
        "minimum_detectable_difference": found.detectable(alpha),
        "to_settle": needed(found, margin, alpha) if word == "inconclusive" else None,
        "metric": on.metric,
        "arms": list(arms),
        "margin": margin,
        "alpha": alpha,
        "rule_version": RULE_VERSION,
        "configs": on.configs,
        "n_prompts": found.num_prompts,
        "n_clusters": found.num_clusters,
        "effective_clusters": found.effective_clusters,
        "n_seeds": dict(zip(kept, found.num_seeds, strict=True)),
        "n_unscored": n_unscored,
        "means": {name: float(arm.values.mean()) for name, arm in kept.items()},
        "run_means": {name: arm.run_means for name, arm in kept.items()},
        "guards": tested,
        "pairs": pairs,
        "best_set": best_set(everyone, pairs),
        "against_base": arms_against_base(
            on.frame, on.metric, {**on.configs, **on.others}, alpha=alpha, cluster=cluster
        ),
        "warnings": warnings,
        "reason": "",
        "caveats": selection_caveats(doubted),
        "recommendation": {"ship": "", "why": "", "next": ""},
    }
    if doubted:
        result["selection"] = doubted
    result["reason"] = reason(result)
    result["recommendation"] = recommend(result)
    return result


def basis(
    scores: pd.DataFrame,
    *,
    metric: str | None,
    arms: tuple[str, str],
    cluster: str | None = None,
    others: Sequence[str] | None = None,
) -> Basis:
    """Return what a verdict on these scores rests on; arguments as for `verdict`.

    Raises:
        UsageError: as `verdict`.
    """
    frame = checked(scores)
    metric = choose_metric(frame, metric, arms)
    deciding = deciding_scores(frame, metric, arms, cluster)
    ranked, left_out = rankable(frame, metric, arms, others, cluster)
    frame, copied = drop_copies(frame, metric, {**deciding.configs, **ranked})
    if copied:
        deciding = deciding_scores(frame, metric, arms, cluster)
    kept, unscored = paired(deciding.arms)
    num_prompts = prompts_behind(frame, metric, list(deciding.configs))
    return Basis(
        frame,
        metric,
        deciding.configs,
        ranked,
        deciding.arms,
        kept,
        components_of_arms(kept, num_prompts),
        num_prompts,
        [*copied, *deciding.warnings, *left_out, *unscored],
    )


def expectation_problem(result: Verdict, expected: str) -> str:
    """Return why a verdict is not the expected one; empty where it is.

    Args:
        result: the contents of verdict.json.
        expected: an arm, or `tie`, `inconclusive` or `trade-off`.

    Raises:
        UsageError: an expectation that no verdict on these arms can meet.
    """
    check_expected(expected, result["arms"])
    if result["verdict"] == expected:
        return ""
    return f"expected {expected}, and the verdict is {result['verdict']}"


def check_expected(expected: str, arms: Sequence[str]) -> None:
    """Refuse an expectation that no verdict on two arms can meet; arguments as for `expectation_problem`.

    Raises:
        UsageError: names what may be expected.
    """
    allowed = expectations(arms)
    if expected not in allowed:
        raise UsageError(f"expect={expected}: no verdict on these arms can be that; allowed: {', '.join(allowed)}")


def expectations(arms: Sequence[str]) -> tuple[str, ...]:
    """Return the verdicts that may be expected of two arms."""
    return (*arms, *WORDS)


def _test_guard(
    on: Basis, guard: Guard, winner: str | None, arms: Sequence[str], cluster: str | None, alpha: float
) -> GuardResult:
    """Test one-sided non-inferiority on a second metric: of the winner, or of the first arm where there is none."""
    metric, margin = str(guard["metric"]), float(guard["margin"])
    choose_metric(on.frame, metric)
    golden = confirmed(on.frame[(on.frame["split"] == "golden") & (on.frame["scorer"] == metric)])
    configs = {**on.configs, **on.others}
    kept, _ = paired(laid_out(golden, {arm: configs[arm] for arm in arms}, cluster))
    first = winner or arms[0]
    second = next(arm for arm in arms if arm != first)
    num_prompts = prompts_behind(on.frame, metric, list(arms))
    found = components_of_arms({first: kept[first], second: kept[second]}, num_prompts)
    bound = found.lower_bound(alpha)
    return {
        "metric": metric,
        "margin": margin,
        "of": first,
        "difference": found.difference,
        "lower_bound": bound,
        "passed": bound > -margin,
    }


def _bound_warnings(on: Basis, decided: str, *, arms: Sequence[str], margin: float, alpha: float) -> list[str]:
    """Warn where the missing scores, all 0 for one arm and all 1 for the other, would give another verdict."""
    others = set()
    for low in on.runs:
        filled = components_of_arms(_filled(on.runs, low), on.num_prompts)
        others.add(decide_interval(filled, arms=arms, margin=margin, alpha=alpha)[0])
    if others == {decided}:
        return []
    words = " or ".join(sorted(others))
    return [f"the missing scores could change the verdict: with 0 for one arm and 1 for the other it is {words}"]


def _filled(runs: Mapping[str, ArmScores], low: str) -> dict[str, ArmScores]:
    """Fill missing scores with 0 for the arm `low` and with 1 for the other: one extreme of the possible scores."""
    return {
        name: replace(arm, values=np.where(np.isnan(arm.values), 0.0 if name == low else 1.0, arm.values))
        for name, arm in runs.items()
    }
