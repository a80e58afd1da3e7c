"""The scorer `length_controlled`: the preferences of the judge or the reward model, at no difference of length.

Each run has its own regression; the score of a prompt is its jackknife value, so that the
decision rule sees the win rate's own uncertainty. Such values may lie outside of [0, 1]; their mean is the win rate.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from harness.config.schema import LengthControlConfig, ScoreConfig
from harness.score.answers import Preference, Stored, read_preferences
from harness.study.errors import UsageError
from harness.study.files import write_json
from harness.study.manifest import Manifest

FACTS = "length_controlled.json"
SOURCES = ("judge", "reward_model")
_MIN_PROMPTS = 3


def control_runs(stored: Stored, config: ScoreConfig, cache: Path) -> dict[Path, list[Preference]]:
    """Control the preferences that an earlier scorer has kept; writes length_controlled.json into the study's folder.

    Raises:
        UsageError: where no run has such preferences, or AlpacaEval's files do not fit.
    """
    source = _source(stored, config.length_control)
    difficulty = _difficulty(config.length_control, stored)
    gamed = _gamed(config.length_control)
    found: dict[Path, list[Preference]] = {}
    facts: dict[str, Any] = {"of": source, "difficulty": config.length_control.difficulty, "runs": {}}
    for run in stored.runs:
        kept = [one for one in read_preferences(run.folder, source) if not run.failed and one.split in stored.splits]
        splits = sorted({one.split for one in kept})
        found[run.folder] = []
        for split in splits:
            rows = [one for one in kept if one.split == split]
            fitted, values = _control(rows, difficulty if split == "golden" else {}, gamed)
            found[run.folder] += values
            if fitted and split == "golden" and run is not stored.runs[0]:
                facts["runs"][run.folder.name] = _facts(run.manifest, fitted)
    named = {f"{row['arm']} seed {row['seed']}": row["problems"] for row in facts["runs"].values()}
    facts["warnings"] = [f"length_controlled, {name}: {text}" for name, texts in named.items() for text in texts]
    write_json(stored.study / FACTS, facts)
    return found


def _facts(manifest: Manifest, fitted: LengthControlled) -> dict[str, Any]:
    about = {"arm": manifest["arm"], "config": manifest["config"], "seed": manifest["seed"]}
    rates = {"win_rate": fitted.win_rate, "raw": fitted.raw, "longer": fitted.longer}
    return {**about, **rates, "problems": fitted.problems()}


def _source(stored: Stored, config: LengthControlConfig) -> str:
    wanted = [config.of] if config.of else list(SOURCES)
    for source in wanted:
        if any(read_preferences(run.folder, source) for run in stored.runs[1:]):
            return source
    raise UsageError(
        f"length_controlled: no preferences of {' or '.join(wanted)} are stored in {stored.study}; score with it first "
        f"(python -m harness.score {stored.study} {wanted[0]} length_controlled ...)"
    )


def _control(
    rows: Sequence[Preference], difficulty: dict[str, float], gamed: Gamed | None
) -> tuple[LengthControlled | None, list[Preference]]:
    """Return the fit and the jackknife value of each prompt; prompts without a preference have no value either."""
    known = [one for one in rows if one.preference is not None]
    lost = [_of(one, None, one.reason or "has no preference") for one in rows if one.preference is None]
    if len(known) < _MIN_PROMPTS:
        return None, [*lost, *(_of(one, None, "fewer than three preferences") for one in known)]
    preferences = np.array([one.preference for one in known], dtype=float)
    differences = np.array([one.answer_chars - one.baseline_chars for one in known], dtype=float)
    given = np.array([difficulty[one.prompt_id] for one in known]) if difficulty else None
    fitted = length_controlled(preferences, differences, difficulty=given, gamed=gamed if difficulty else None)
    values = zip(known, fitted.pseudo_values.tolist(), strict=True)
    return fitted, [*lost, *(_of(one, value, "") for one, value in values)]


def _of(one: Preference, value: float | None, reason: str) -> Preference:
    return Preference(one.split, one.prompt_id, value, one.answer_chars, one.baseline_chars, reason)


def _difficulty(config: LengthControlConfig, stored: Stored) -> dict[str, float]:
    """Read AlpacaEval's instruction difficulty, one number a golden prompt in the order of the golden file."""
    if config.difficulty is None:
        return {}
    golden = [row["prompt_id"] for row in stored.prompts if row["split"] == "golden"]
    numbers = [row[-1] for row in _read_csv(config.difficulty, "difficulty")]
    if len(numbers) != len(golden):
        raise UsageError(
            f"score.length_control.difficulty={config.difficulty}: {len(numbers)} numbers for {len(golden)} golden "
            "prompts; AlpacaEval's file is for its own 805 prompts in their order, and other prompts go without"
        )
    return dict(zip(golden, numbers, strict=True))


def _gamed(config: LengthControlConfig) -> Gamed | None:
    """Read AlpacaEval's df_gamed.csv; its lengths are the baseline's minus the gamed answer's."""
    if config.gamed is None:
        return None
    if config.difficulty is None:
        raise UsageError("score.length_control.gamed: needs score.length_control.difficulty beside it")
    rows = np.array(_read_csv(config.gamed, "gamed", ("preference", "std_delta_len", "instruction_difficulty")))
    return Gamed(rows[:, 0], -rows[:, 1], rows[:, 2])


def _read_csv(path: str, key: str, columns: Sequence[str] = ()) -> list[list[float]]:
    """Read numbers; of all columns, the last one counting, where none are named."""
    try:
        with Path(path).open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        return [[float(row[name]) for name in columns or list(row)[-1:]] for row in rows]
    except (OSError, KeyError, ValueError, TypeError) as error:
        needed = ", ".join(columns) or "one number a row, under a heading"
        raise UsageError(f"score.length_control.{key}={path}: not readable ({error}); needed: {needed}") from error


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
