"""The scorer `length_controlled`: the preferences of the judge or the reward model, at no difference of length.

Each run has its own regression (`harness.lengthcontrol`); the score of a prompt is its jackknife value, so that the
decision rule sees the win rate's own uncertainty. Such values may lie outside of [0, 1]; their mean is the win rate.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from harness.lengthcontrol import Gamed, LengthControlled, length_controlled
from harness.records import UsageError, write_json
from harness.scoreconfig import LengthControlConfig, ScoreConfig
from harness.stored import Preference, Stored, read_preferences

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


def _facts(manifest: dict[str, Any], fitted: LengthControlled) -> dict[str, Any]:
    about = {key: manifest[key] for key in ("arm", "config", "seed")}
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
