"""More than two arms: every pair of arms by the same rule, the arms that none beats, and each arm against the base."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd

from harness.config.arms import BASE
from harness.decide.deciding import (
    components_of_arms,
    confirmed,
    decide_interval,
    deciding_scores,
    laid_out,
    paired,
)
from harness.decide.stats import Components, Interval, against_base
from harness.study.decision import AgainstBase, PairResult
from harness.study.errors import UsageError

WORDS = ("tie", "inconclusive", "trade-off")  # of a verdict, beside the name of an arm
_LEAST_ALPHA = 1e-12


def rankable(
    frame: pd.DataFrame, metric: str, arms: Sequence[str], others: Sequence[str] | None, cluster: str | None
) -> tuple[dict[str, str], list[str]]:
    """Return the configs of the other arms that can be compared with the contrast, and a warning for each other one.

    Args:
        frame: checked scores.
        metric: the scorer that decides.
        arms: the contrast.
        others: the arms beside the contrast; None for all that the scores hold, the base left out.
        cluster: column with the prompts' clusters, if it is not `cluster`.
    """
    golden = frame[(frame["split"] == "golden") & (frame["scorer"] == metric)]
    if others is None:
        others = [str(arm) for arm in golden["arm"].unique() if arm != BASE]
    configs, warnings = {}, []
    for arm in others:
        if arm in arms:
            continue
        try:
            configs[arm] = deciding_scores(frame, metric, [arms[0], arm], cluster).configs[arm]
        except UsageError as error:
            warnings.append(f"{arm} is left out of the ranking: {error}")
    return configs, warnings


def shared_alphas(
    found: Mapping[tuple[str, str], Interval], *, margin: float, alpha: float
) -> dict[tuple[str, str], float]:
    """Return the error rate of each pair by Holm's method (1979): the clearest pair gets alpha over their number.

    A pair is clear by the smaller alpha of its two claims, a winner and a tie. At most one of them can be false, so
    that the chance of any false claim among the pairs stays at most alpha.
    """
    clarity = {pair: _least_alpha(one, pair, margin) for pair, one in found.items()}
    shares, rest = {}, len(found)
    stopped = False
    for pair in sorted(clarity, key=lambda pair: clarity[pair]):
        shares[pair] = alpha / rest
        stopped = stopped or clarity[pair] > shares[pair]
        rest -= 0 if stopped else 1
    return shares


def _least_alpha(found: Interval, pair: tuple[str, str], margin: float) -> float:
    """Return the smallest alpha at which the rule says a winner or a tie, by bisection; 1 where none does."""
    low, high = np.log(_LEAST_ALPHA), np.log(0.499)
    if decide_interval(found, arms=pair, margin=margin, alpha=float(np.exp(high)))[0] == "inconclusive":
        return 1.0
    for _ in range(40):
        middle = (low + high) / 2
        if decide_interval(found, arms=pair, margin=margin, alpha=float(np.exp(middle)))[0] == "inconclusive":
            low = middle
        else:
            high = middle
    return float(np.exp(high))


def other_pairs(
    frame: pd.DataFrame,
    metric: str,
    arms: Sequence[str],
    *,
    margin: float,
    alpha: float,
    cluster: str | None,
    num_prompts: int | None,
    is_failed: Callable[[tuple[str, str], str], bool],
) -> list[PairResult]:
    """Return the result of every pair of arms but the first two, whose contrast is decided at its own alpha.

    Args:
        frame: checked scores without copies.
        metric: the scorer that decides.
        arms: the contrast, then the other arms.
        margin, alpha, cluster: of the rule.
        num_prompts: as in `components_of_arms`.
        is_failed: whether the winner of a pair fails a guard.
    """
    found: dict[tuple[str, str], Components] = {}
    for pair in itertools.combinations(arms, 2):
        if pair != tuple(arms[:2]):
            kept, _ = paired(deciding_scores(frame, metric, pair, cluster).arms)
            found[pair] = components_of_arms(kept, num_prompts)
    shares = shared_alphas(found, margin=margin, alpha=alpha)
    results: list[PairResult] = []
    for pair, one in found.items():
        word, winner = decide_interval(one, arms=pair, margin=margin, alpha=shares[pair])
        word = "trade-off" if winner and is_failed(pair, winner) else word
        results.append(pair_result(pair, one, word, shares[pair]))
    return results


def pair_result(pair: Sequence[str], found: Interval, word: str, alpha: float) -> PairResult:
    """Return a row of `pairs`."""
    return {
        "arms": list(pair),
        "difference": found.difference,
        "ci95": within_range(found.interval(1 - alpha)),
        "verdict": word,
        "alpha": alpha,
    }


def within_range(interval: tuple[float, float]) -> list[float]:
    """Return an interval without the values that no difference of scores in [0, 1] can have."""
    return [float(min(max(end, -1.0), 1.0)) for end in interval]


def best_set(arms: Sequence[str], pairs: Sequence[PairResult]) -> list[str]:
    """Return the arms that no arm beats; a winner that fails a guard beats none."""
    beaten = {arm for row in pairs for arm in row["arms"] if row["verdict"] not in (*WORDS, arm)}
    return [arm for arm in arms if arm not in beaten]


def arms_against_base(
    frame: pd.DataFrame, metric: str, configs: Mapping[str, str], *, alpha: float, cluster: str | None
) -> dict[str, AgainstBase]:
    """Return each arm's difference to the SFT base, where the base was scored on the same prompts.

    The base is one given model: only the arm's runs and the prompts are samples.

    Args:
        frame: checked scores without copies.
        metric: the scorer that decides.
        configs: the deciding config of each arm.
        alpha, cluster: of the rule.
    """
    golden = confirmed(frame[(frame["split"] == "golden") & (frame["scorer"] == metric)])
    labels = golden[golden["arm"] == BASE]["config"].unique()
    if len(labels) != 1 or "prompt_id" not in golden:
        return {}
    results: dict[str, AgainstBase] = {}
    for arm, config in configs.items():
        try:
            kept, _ = paired(laid_out(golden, {arm: config, BASE: str(labels[0])}, cluster))
            found = against_base(kept[arm].values, kept[BASE].values, kept[arm].clusters)
        except (UsageError, ValueError):
            continue  # other prompts than the arm's, or too few of them: no paired comparison
        results[arm] = {
            "difference": found.difference,
            "ci95": within_range(found.interval(1 - alpha)),
            "collapsed": 2 * len(kept[arm].flags) >= len(kept[arm].seeds),
        }
    return results
