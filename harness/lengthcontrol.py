"""Length-controlled win rates: what a policy would win if its answers were as long as the baseline's.

Dubois et al. 2024 (arXiv 2404.04475): a logistic regression of the preference on a constant, the difference of lengths
and, where it is known, the instruction's difficulty; the win rate is then predicted at no difference of length.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# A weak Gaussian prior on each weight: without it, a policy that wins every comparison has no finite weights.
_PRIOR = 1e-3
_STEPS = 50
GAMED_WEIGHT = 0.1  # AlpacaEval 2: the two gamed baselines together weigh 0.2 in the fit

LARGE_SHIFT = 0.1
FEW_LONGER = 0.05


@dataclass(frozen=True)
class Gamed:
    """Comparisons of a gamed baseline (longer or shorter on purpose) with the baseline itself; AlpacaEval 2 adds them.

    Attributes:
        preferences: (num_rows,) in [0, 1], 1 where the gamed answer wins.
        differences: (num_rows,) characters of the gamed answer minus the baseline's, over their standard deviation.
        difficulty: (num_rows,) of the instruction.
    """

    preferences: np.ndarray
    differences: np.ndarray
    difficulty: np.ndarray


@dataclass(frozen=True)
class LengthControlled:
    """A length-controlled win rate.

    Attributes:
        win_rate: predicted at no difference of length, in [0, 1].
        raw: the mean preference.
        pseudo_values: (num_prompts,) jackknife values n*W - (n-1)*W without this prompt; their mean is the win rate up
            to terms of order 1/n, and their spread is its standard error's. Single ones may lie outside [0, 1].
        longer: share of the prompts where the policy's answer is the longer one.
    """

    win_rate: float
    raw: float
    pseudo_values: np.ndarray
    longer: float

    def problems(self) -> list[str]:
        """Say where the model predicts beyond what was seen."""
        found = []
        if abs(self.win_rate - self.raw) > LARGE_SHIFT:
            found.append(f"length control moves the win rate from {self.raw:.1%} to {self.win_rate:.1%}")
        if not FEW_LONGER <= self.longer <= 1 - FEW_LONGER:
            found.append(
                f"{self.longer:.0%} of the answers are longer than the baseline's: no difference of length is outside "
                "of what was compared, and the length-controlled win rate is an extrapolation"
            )
        return found


def length_controlled(
    preferences: np.ndarray,
    differences: np.ndarray,
    *,
    difficulty: np.ndarray | None = None,
    gamed: Gamed | None = None,
) -> LengthControlled:
    """Fit one policy's preferences and predict its win rate at no difference of length.

    Args:
        preferences: (num_prompts,) in [0, 1]: 1 where the policy wins, 0.5 for a tie.
        differences: (num_prompts,) length of the policy's answer minus the baseline's, in characters.
        difficulty: (num_prompts,) of AlpacaEval's instructions; left out for other prompts, which have none.
        gamed: AlpacaEval's regularisation; needs `difficulty`.

    Raises:
        ValueError: for fewer than three prompts, or preferences outside of [0, 1].
    """
    count = len(preferences)
    if count < 3:
        raise ValueError(f"{count} preferences; a length-controlled win rate needs at least three")
    if np.any((preferences < 0) | (preferences > 1)) or not np.all(np.isfinite(differences)):
        raise ValueError("preferences must lie in [0, 1] and lengths be numbers")
    fixed = _gamed_rows(gamed)
    weights = _fit(preferences, _features(differences, difficulty), fixed, None)
    whole = _predicted(weights, difficulty)
    pseudo = np.empty(count)
    for left_out in range(count):
        kept = np.arange(count) != left_out
        rest = None if difficulty is None else difficulty[kept]
        without = _fit(preferences[kept], _features(differences[kept], rest), fixed, weights)
        pseudo[left_out] = count * whole - (count - 1) * _predicted(without, rest)
    return LengthControlled(whole, float(preferences.mean()), pseudo, float((differences > 0).mean()))


def _features(differences: np.ndarray, difficulty: np.ndarray | None) -> np.ndarray:
    """Return (num_prompts, 2 or 3): the constant, tanh of the standardised difference, the difficulty.

    The difference is scaled and not centred: no difference of length must stay 0.
    """
    scale = differences.std(ddof=1)
    length = np.tanh(differences / scale) if scale > 0 else np.zeros(len(differences))
    columns = [np.ones(len(differences)), length, *([] if difficulty is None else [difficulty])]
    return np.stack(columns, axis=1)


def _gamed_rows(gamed: Gamed | None) -> tuple[np.ndarray, np.ndarray] | None:
    """Return preferences and features of the gamed baselines; they have no constant: to win is not theirs."""
    if gamed is None:
        return None
    columns = [np.zeros(len(gamed.preferences)), np.tanh(gamed.differences), gamed.difficulty]
    return gamed.preferences, np.stack(columns, axis=1)


def _fit(
    preferences: np.ndarray,
    features: np.ndarray,
    fixed: tuple[np.ndarray, np.ndarray] | None,
    start: np.ndarray | None,
) -> np.ndarray:
    """Return the weights of a logistic regression on soft labels, by Newton's method from `start`."""
    rows = np.ones(len(preferences))
    if fixed is not None:
        preferences = np.concatenate([preferences, fixed[0]])
        features = np.concatenate([features, fixed[1]])
        rows = np.concatenate([rows, np.full(len(fixed[0]), GAMED_WEIGHT)])
    prior = _PRIOR * np.eye(features.shape[1])
    weights = np.zeros(features.shape[1]) if start is None else start
    for _ in range(_STEPS):
        predicted = _sigmoid(features @ weights)
        gradient = features.T @ (rows * (preferences - predicted)) - prior @ weights
        hessian = (features * (rows * predicted * (1 - predicted))[:, None]).T @ features + prior
        step = np.linalg.solve(hessian, gradient)
        weights = weights + step * min(1.0, 5.0 / max(np.abs(step).max(), 1e-12))  # far steps overshoot
        if np.abs(step).max() < 1e-9:
            break
    return weights


def _predicted(weights: np.ndarray, difficulty: np.ndarray | None) -> float:
    """Return the mean prediction at no difference of length."""
    if difficulty is None:
        return float(_sigmoid(weights[0]))
    return float(_sigmoid(weights[0] + weights[2] * difficulty).mean())


def _sigmoid(values: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(np.asarray(values) / 2))
