"""The scorer `length_controlled`: preferences of the judge or the reward model, predicted at equal length.

Input: preferences.jsonl per run -> jackknife values per prompt, and length_controlled.json in the study's folder.
One logistic regression per run and split (Dubois et al. 2024, arXiv 2404.04475). The mean of the jackknife values is
the win rate, and their spread gives the decision rule its uncertainty. Single values may lie outside [0, 1].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np

from harness.config.checkpoint import Checkpoints
from harness.config.schema import LengthControlConfig, ScoreConfig
from harness.config.trial_id import plain
from harness.score.alpaca_files import FULL, Gamed, controlled_name, leaderboard_warning, read_difficulty, read_gamed
from harness.score.answers import Preference, Run, Stored, read_preferences
from harness.study.errors import UsageError
from harness.study.files import Json, write_json
from harness.study.registration import read_study

FACTS = "length_controlled.json"
_KEY = "score.length_control"
SOURCES = ("judge", "reward_model")  # in the order of choice
GAMED_WEIGHT = 0.1  # AlpacaEval 2: the two gamed baselines together weigh 0.2 in the fit
MIN_PREFERENCES = 3
_PRIOR = 1e-3  # precision of a Gaussian prior per weight: a policy that wins everything gets finite weights
_STEPS = 50  # of Newton's method
# Limits of the warnings: shift of the win rate, and share of answers that are longer (or shorter).
_MAX_SHIFT = 0.1
_MIN_LONGER = 0.05


class RunFacts(TypedDict):
    """Length-controlled and raw win rate of a run on golden, the share of its longer answers, and its problems."""

    arm: str
    config: str
    seed: int
    win_rate: float
    raw: float
    longer: float
    problems: list[str]


class LengthControlFacts(TypedDict):
    """length_controlled.json: the source scorer, the difficulty file, facts by run, and warnings for the report."""

    of: str
    difficulty: str | None
    runs: dict[str, RunFacts]
    warnings: list[str]


def length_control_settings(score: ScoreConfig, checkpoints: Checkpoints) -> dict[str, Json]:
    """Return the registered settings of length control."""
    return {"length_control": plain(score.length_control)}


def length_control_problems(config: LengthControlConfig) -> Iterator[str]:
    """Yield what is wrong with AlpacaEval's files, before anything is trained or judged."""
    if config.gamed is not None and config.difficulty is None:
        yield f"{_KEY}.gamed={config.gamed}: needs {_KEY}.difficulty beside it: AlpacaEval's fit contains both"
    for path, key, read in (
        (config.difficulty, "difficulty", read_difficulty),
        (config.gamed, "gamed", read_gamed),
    ):
        try:
            if path is not None:
                read(path, f"{_KEY}.{key}")
        except UsageError as error:
            yield str(error)


def name_by_files(config: LengthControlConfig) -> str:
    """Return the name of the scores: AlpacaEval's own where the fit is."""
    return controlled_name(has_difficulty=config.difficulty is not None, has_gamed=config.gamed is not None)


def stored_name(stored: Stored, config: LengthControlConfig) -> str:
    """Return the name of a study's scores; a study that registered `length_controlled` without files keeps it."""
    path = stored.study / "study.yaml"
    if not path.is_file():
        return name_by_files(config)
    registered = read_study(path)
    decides = [registered.get("metric"), *(guard["metric"] for guard in registered.get("guards") or ())]
    return FULL if FULL in decides else name_by_files(config)


def control_runs(stored: Stored, config: LengthControlConfig) -> dict[Path, list[Preference]]:
    """Control the stored preferences of another scorer; writes length_controlled.json into the study's folder.

    Raises:
        UsageError: where no run has such preferences, or AlpacaEval's files do not fit.
    """
    source, name = _source(stored, config), stored_name(stored, config)
    difficulty = _difficulty(config, stored)
    gamed = _gamed(config)
    found: dict[Path, list[Preference]] = {}
    facts: LengthControlFacts = {"of": source, "difficulty": config.difficulty, "runs": {}, "warnings": []}
    facts["warnings"] += _leaderboard_warnings(stored, config, name)
    for run in stored.runs:
        kept = [one for one in read_preferences(run.folder, source) if not run.failed and one.split in stored.splits]
        found[run.folder] = []
        for split in sorted({one.split for one in kept}):
            rows = [one for one in kept if one.split == split]
            fitted, values = _control(rows, difficulty if split == "golden" else {}, gamed)
            found[run.folder] += values
            if fitted and split == "golden" and run is not stored.runs[0]:
                facts["runs"][run.folder.name] = _run_facts(run, fitted)
                facts["warnings"] += [f"{name}, {run.title}: {text}" for text in fitted.problems()]
    write_json(stored.study / FACTS, facts)
    return found


def _leaderboard_warnings(stored: Stored, config: LengthControlConfig, name: str) -> list[str]:
    """Warn where somebody may take the scores for the leaderboard's: AlpacaEval's prompts, or its name."""
    is_alpaca_eval = any(row["about"].get("form") == "alpaca_eval" for row in stored.prompts if row.get("about"))
    warning = leaderboard_warning(has_difficulty=config.difficulty is not None, has_gamed=config.gamed is not None)
    return [f"{name}: {warning}"] if warning and (is_alpaca_eval or name == FULL) else []


def _source(stored: Stored, config: LengthControlConfig) -> str:
    wanted = [config.of] if config.of else list(SOURCES)
    for source in wanted:
        if any(read_preferences(run.folder, source) for run in stored.runs[1:]):
            return source
    raise UsageError(
        f"length_controlled: no preferences of {' or '.join(wanted)} are stored in {stored.study}; score with it first "
        f"(python -m harness.score {stored.study} {wanted[0]} length_controlled ...)"
    )


def _run_facts(run: Run, fitted: LengthControlled) -> RunFacts:
    return {
        "arm": run.manifest["arm"],
        "config": run.manifest["config"],
        "seed": run.manifest["seed"],
        "win_rate": fitted.win_rate,
        "raw": fitted.raw,
        "longer": fitted.longer,
        "problems": fitted.problems(),
    }


def _control(
    rows: Sequence[Preference], difficulty: Mapping[str, float], gamed: Gamed | None
) -> tuple[LengthControlled | None, list[Preference]]:
    """Return the fit, and per prompt its jackknife value; a prompt without a preference has no value."""
    known = [(one, one.preference) for one in rows if one.preference is not None]
    lost = [_controlled(one, None, one.reason or "has no preference") for one in rows if one.preference is None]
    if len(known) < MIN_PREFERENCES:
        return None, [*lost, *(_controlled(one, None, "fewer than three preferences") for one, _ in known)]
    preferences = np.array([preference for _, preference in known])
    differences = np.array([float(one.answer_chars - one.baseline_chars) for one, _ in known])
    given = np.array([difficulty[one.prompt_id] for one, _ in known]) if difficulty else None
    fitted = length_controlled(preferences, differences, difficulty=given, gamed=gamed if difficulty else None)
    values = zip(known, fitted.pseudo_values.tolist(), strict=True)
    return fitted, [*lost, *(_controlled(one, value, "") for (one, _), value in values)]


def _controlled(one: Preference, value: float | None, reason: str) -> Preference:
    return Preference(one.split, one.prompt_id, value, one.answer_chars, one.baseline_chars, reason)


def _difficulty(config: LengthControlConfig, stored: Stored) -> dict[str, float]:
    """Read AlpacaEval's instruction difficulty by prompt_id: one number per golden prompt, in the file's order."""
    if config.difficulty is None:
        return {}
    golden = [row["prompt_id"] for row in stored.prompts if row["split"] == "golden"]
    numbers = read_difficulty(config.difficulty, f"{_KEY}.difficulty").tolist()
    if len(numbers) != len(golden):
        raise UsageError(
            f"{_KEY}.difficulty={config.difficulty}: {len(numbers)} numbers for {len(golden)} golden "
            "prompts; AlpacaEval's file is for its own 805 prompts in their order, and other prompts go without"
        )
    return dict(zip(golden, numbers, strict=True))


def _gamed(config: LengthControlConfig) -> Gamed | None:
    if config.gamed is None:
        return None
    if config.difficulty is None:
        raise UsageError(f"{_KEY}.gamed: needs {_KEY}.difficulty beside it")
    return read_gamed(config.gamed, f"{_KEY}.gamed")


@dataclass(frozen=True)
class LengthControlled:
    """A length-controlled win rate.

    Attributes:
        win_rate: predicted at equal length, in [0, 1].
        raw: the mean preference.
        pseudo_values: (num_prompts,) jackknife values n*W - (n-1)*W_i, with W_i the win rate without prompt i. Their
            mean is the win rate (without gamed baselines up to order 1/n); their standard deviation / sqrt(n) is its
            standard error.
        longer: share of the prompts with a longer answer than the baseline's.
    """

    win_rate: float
    raw: float
    pseudo_values: np.ndarray
    longer: float

    def problems(self) -> list[str]:
        """Say where the prediction is an extrapolation."""
        found = []
        if abs(self.win_rate - self.raw) > _MAX_SHIFT:
            found.append(f"length control moves the win rate from {self.raw:.1%} to {self.win_rate:.1%}")
        if not _MIN_LONGER <= self.longer <= 1 - _MIN_LONGER:
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
    """Fit one policy's preferences and predict its win rate at equal length.

    Args:
        preferences: (num_prompts,) in [0, 1]: 1 where the policy wins, 0.5 for a tie.
        differences: (num_prompts,) length of the policy's answer minus the baseline's, in characters.
        difficulty: (num_prompts,) of AlpacaEval's instructions; None for other prompts.
        gamed: AlpacaEval's regularisation; needs `difficulty`.

    Raises:
        ValueError: for fewer than three prompts, preferences outside [0, 1], or lengths that are not finite.
    """
    count = len(preferences)
    if count < MIN_PREFERENCES:
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
    if gamed is not None:
        # Their rows stay where a prompt is left out, so that the mean of the jackknife values would undo their pull.
        pseudo += whole - pseudo.mean()
    return LengthControlled(whole, float(preferences.mean()), pseudo, float((differences > 0).mean()))


def _features(differences: np.ndarray, difficulty: np.ndarray | None) -> np.ndarray:
    """Return (num_prompts, 2 or 3): the constant, tanh of the scaled difference, the difficulty.

    The difference is scaled and not centred, so that equal length stays 0.
    """
    scale = differences.std(ddof=1)
    length = np.tanh(differences / scale) if scale > 0 else np.zeros(len(differences))
    columns = [np.ones(len(differences)), length, *([] if difficulty is None else [difficulty])]
    return np.stack(columns, axis=1)


def _gamed_rows(gamed: Gamed | None) -> tuple[np.ndarray, np.ndarray] | None:
    """Return preferences and features of the gamed baselines; their constant is 0, as they are the baseline itself."""
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
        weights = weights + step * min(1.0, 5.0 / max(np.abs(step).max(), 1e-12))  # longer steps overshoot
        if np.abs(step).max() < 1e-9:
            break
    return weights


def _predicted(weights: np.ndarray, difficulty: np.ndarray | None) -> float:
    """Return the mean prediction at equal length."""
    if difficulty is None:
        return float(_sigmoid(weights[0]))
    return float(_sigmoid(weights[0] + weights[2] * difficulty).mean())


def _sigmoid(values: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(np.asarray(values) / 2))
