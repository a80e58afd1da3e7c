"""Judge the judge: how often it agrees with pairs whose better answer is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from scipy import stats

from harness.data import DataSpec
from harness.judge.compare import Comparison, Judgement
from harness.records import Pair
from harness.stored import as_text
from harness.tables import read_table


def agreement(reference: str, compare: Callable[[Sequence[Comparison]], list[Judgement]]) -> dict[str, Any]:
    """Ask the judge about pairs with known labels.

    Args:
        reference: a file of preference pairs, in any form that `data.golden` reads.
        compare: asks the judge, in both orders.

    Returns:
        `path`, `pairs`, `unscored`, `agreement` (a contradiction counts half) and its Wilson interval at 95%, which
        is too wide rather than too narrow where there are contradictions.
    """
    limit = DataSpec().max_bad_fraction
    table = read_table(reference, key="score.calibration_pairs", revision=None, max_bad_fraction=limit)
    pairs = [pair for row in table.rows if (pair := row.pair()) is not None]
    judgements = compare([_comparison(pair) for pair in pairs])
    scores = [judgement.score for judgement in judgements if judgement.score is not None]
    found = {"path": reference, "pairs": len(pairs), "unscored": len(pairs) - len(scores)}
    if not scores:
        return {**found, "agreement": None, "ci95": None}
    share = fmean(scores)
    return {**found, "agreement": share, "ci95": list(wilson(share, len(scores)))}


def _comparison(pair: Pair) -> Comparison:
    return Comparison(as_text(pair.prompt), as_text(pair.chosen), as_text(pair.rejected))


def wilson(share: float, count: int, level: float = 0.95) -> tuple[float, float]:
    """Return Wilson's score interval of a share of `count` cases (Wilson 1927)."""
    z = float(stats.norm.ppf((1 + level) / 2))
    centre = share + z * z / (2 * count)
    spread = z * (share * (1 - share) / count + z * z / (4 * count * count)) ** 0.5
    scale = 1 + z * z / count
    return (centre - spread) / scale, (centre + spread) / scale
