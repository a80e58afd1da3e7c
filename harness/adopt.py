"""A study of answers that were made elsewhere: golden set and outputs in, a folder that score and decide read out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness.arms import ARMS
from harness.data import evaluation_prompts
from harness.degenerate import completion_flags
from harness.fingerprints import fingerprints
from harness.inputs import prompt_row
from harness.manifest import write_manifest
from harness.outputs import read_outputs
from harness.records import UsageError, digest, file_sha256, write_jsonl
from harness.registration import contrast_of, write_study
from harness.tables import read_table

CONFIG = "given"
GIVEN = "given answers"  # in the place of a model
_MAX_BAD = 0.01


@dataclass(frozen=True)
class Question:
    """What the study asks: the metric that decides, the margin and the error rate."""

    metric: str
    margin: float = 0.05
    alpha: float = 0.05


def adopt(
    study: Path, golden: str, runs: Mapping[tuple[str, int], str], baseline: str, question: Question, command: str
) -> Path:
    """Write a study of given answers.

    Args:
        study: its folder, which must not be there yet.
        golden: the golden set, in any form that `data.golden` reads.
        runs: files of answers by (arm, seed).
        baseline: the answers that every arm is measured against, in place of an SFT base's.
        question: what decides.
        command: for the report.

    Raises:
        UsageError: for a study that exists, an unknown arm, a single arm, or answers that do not fit the golden set.
    """
    if study.exists():
        raise UsageError(f"{study}: exists already; give another folder")
    arms = list(dict.fromkeys(arm for arm, _ in runs))
    unknown = [arm for arm in arms if arm not in ARMS or not ARMS[arm].trainer]
    if unknown or len(arms) < 2:
        known = ", ".join(name for name, arm in ARMS.items() if arm.trainer)
        raise UsageError(f"arms {', '.join(arms) or 'none'}: give answers of two arms out of {known}, as simpo:1=FILE")
    table = read_table(golden, key="data.golden", revision=None, max_bad_fraction=_MAX_BAD)
    prompts = [prompt_row("golden", prompt, 0) for prompt in evaluation_prompts(table.rows)]
    answers = {place: read_outputs(path, prompts, key=f"{place[0]}:{place[1]}") for place, path in runs.items()}
    base = read_outputs(baseline, prompts, key="--baseline")
    for name, found in (*answers.items(), ("--baseline", base)):
        lacking = len(prompts) - len(found)
        if lacking:
            raise UsageError(f"{name}: no answer to {lacking} of {len(prompts)} golden prompts; answer all of them")
    _register(study, arms, runs, table.facts | {"prompts": len(prompts)}, question, command)
    write_jsonl(study / "prompts.jsonl", prompts)
    _write_run(study / "base", "sft", 0, prompts, base, baseline)
    for (arm, seed), found in answers.items():
        path = runs[arm, seed]
        name = digest([arm, seed, file_sha256(Path(path))])[:12]
        _write_run(study / "trials" / name, arm, seed, prompts, found, path)
    return study


def _register(
    study: Path,
    arms: Sequence[str],
    runs: Mapping[tuple[str, int], str],
    facts: dict[str, Any],
    question: Question,
    command: str,
) -> None:
    rule = {"metric": question.metric, "margin": question.margin, "alpha": question.alpha, "guards": [], "looks": []}
    fixed = {**rule, "golden": facts["sha256"]}
    write_study(
        study / "study.yaml",
        {
            "study": study.name,
            "question": "Which of the given answers are better?",
            "arms": list(arms),
            "contrast": contrast_of(arms),
            "configs": {arm: [CONFIG] for arm in arms},
            "seeds": {arm: [seed for name, seed in runs if name == arm] for arm in arms},
            "tuned": [],
            "tuning_seeds": [],
            **rule,
            "family": {},
            "model": {"path": GIVEN, "revision": None, "base_sha256": ""},
            "data": {"golden": facts},
            "warnings": [
                "the answers were made elsewhere: how their policies were trained and tuned is not known here"
            ],
            "command": command,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "fixed": fixed,
            "fixed_sha256": digest(fixed),
        },
    )


def _write_run(
    folder: Path, arm: str, seed: int, prompts: Sequence[Mapping[str, Any]], answers: Mapping[str, str], path: str
) -> None:
    rows = [
        {
            "split": "golden",
            "prompt_id": row["prompt_id"],
            "prompt": row["prompt"][-1]["content"],
            "completion": answers[row["prompt_id"]],
            "tokens": len(answers[row["prompt_id"]].split()),  # words: whose tokens they were is not known
            "ended": True,
            "flags": completion_flags(answers[row["prompt_id"]], ended=True),
        }
        for row in prompts
    ]
    write_jsonl(folder / "completions.jsonl", rows)
    write_jsonl(folder / "pairs.jsonl", [])
    write_jsonl(folder / "scores.jsonl", [])
    about = {"trial_id": folder.name, "arm": arm, "config": CONFIG if arm != "sft" else "base", "seed": seed}
    stages: dict[str, Any] = {"status": "complete", "flags": [], "done": ["golden", "score"], "warnings": []}
    source = {"base_sha256": "", "source": {"sha256": file_sha256(Path(path))}}
    write_manifest(folder, {**about, **stages, **source, "seconds": {}, "files": fingerprints(folder, {})})
