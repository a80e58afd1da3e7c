"""Answers that were made elsewhere, by prompt: our completions.jsonl, AlpacaEval's and Arena-Hard's files."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from harness.config.arms import ARMS
from harness.data.inputs import prompt_row
from harness.data.records import prompt_id
from harness.data.sources import read_source
from harness.data.splits import evaluation_prompts
from harness.data.table import read_table
from harness.score.length_control import length_controlled
from harness.score.trial_scores import completion_flags
from harness.study.errors import UsageError
from harness.study.files import digest, file_sha256, write_jsonl
from harness.study.integrity import fingerprints
from harness.study.manifest import Manifest, write_manifest
from harness.study.registration import ALPHA, MARGIN, Guard, contrast_of, write_study
from harness.study.scores_csv import SCORE_COLUMNS

FORMS = (
    "our completions.jsonl (`prompt_id`, `completion`)",
    "AlpacaEval's model_outputs.json (`instruction`, `output`)",
    "Arena-Hard's model_answer/MODEL.jsonl (`question_id` with `choices`, or `uid` with `messages`)",
)


def read_outputs(path: str, prompts: Sequence[Mapping[str, Any]], *, key: str) -> dict[str, str]:
    """Return the answers of a file by prompt_id; those to other prompts are left out.

    Args:
        path: a file of one of `FORMS`.
        prompts: rows of prompts.jsonl.
        key: the config key or option that names the file, for messages.

    Raises:
        UsageError: for an unknown form, an answer that is no text, or two answers to one prompt that differ.
    """
    by_text = {row["prompt"][-1]["content"].strip(): row["prompt_id"] for row in prompts if len(row["prompt"]) == 1}
    by_name = {
        (str(row["about"]["id"]), row["about"].get("turn", 1)): row["prompt_id"] for row in prompts if row["about"]
    }
    known = {row["prompt_id"] for row in prompts}
    found: dict[str, str] = {}
    for number, name, answer in _rows(path, key, by_text, by_name):
        if not isinstance(answer, str):
            raise UsageError(
                f"{key}={path}: row {number}: the answer is of type {type(answer).__name__}; allowed: text"
            )
        if name is not None and name in known and found.setdefault(name, answer) != answer:
            raise UsageError(f"{key}={path}: row {number}: a second answer to the prompt {name}; keep one")
    if not found:
        raise UsageError(f"{key}={path}: answers none of the study's prompts; is it of another golden set?")
    return found


def _rows(
    path: str, key: str, by_text: Mapping[str, str], by_name: Mapping[tuple[str, int], str]
) -> Iterator[tuple[int, str | None, Any]]:
    source = read_source(path, key=key)
    if source.bad_rows:
        raise UsageError(f"{key}: {source.bad_rows[0]}")
    for number, row in source.rows:
        if {"prompt_id", "completion"} <= row.keys():
            yield number, row["prompt_id"], row["completion"]
        elif {"instruction", "output"} <= row.keys():
            yield number, by_text.get(str(row["instruction"]).strip()), row["output"]
        elif {"question_id", "choices"} <= row.keys():
            for turn, said in enumerate(row["choices"][0]["turns"], start=1):
                name = by_name.get((str(row["question_id"]), turn))
                yield number, name, said["content"] if isinstance(said, dict) else said
        elif {"uid", "messages"} <= row.keys():
            said = row["messages"][-1]["content"]
            yield number, by_name.get((str(row["uid"]), 1)), said["answer"] if isinstance(said, dict) else said
        else:
            forms = "".join(f"\n  {form}" for form in FORMS)
            columns = ", ".join(map(str, row))
            raise UsageError(f"{key}={path}: row {number} is of no known form (found: {columns}); allowed:{forms}")


def alpaca_eval_rows(
    prompts: Sequence[Mapping[str, Any]], answers: Mapping[str, str], generator: str
) -> list[dict[str, str]]:
    """Return AlpacaEval's model_outputs: one object a prompt, in the order of the golden file."""
    return [
        {
            "dataset": row["about"].get("dataset", ""),
            "instruction": row["prompt"][-1]["content"],
            "output": answers[row["prompt_id"]],
            "generator": generator,
        }
        for row in prompts
        if row["prompt_id"] in answers and not row.get("follows")
    ]


def arena_hard_rows(
    prompts: Sequence[Mapping[str, Any]], answers: Mapping[str, str], generator: str, tokens: Mapping[str, int]
) -> list[dict[str, Any]]:
    """Return the rows of Arena-Hard's model_answer file, of the version that the golden file is of."""
    rows = []
    for row in prompts:
        if row["prompt_id"] not in answers or row["about"].get("form") != "arena_hard":
            continue
        answer, name = answers[row["prompt_id"]], row["about"]["id"]
        metadata = {"token_len": tokens.get(row["prompt_id"], 0), **markdown_counts(answer)}
        if row["about"]["version"] == "v0.1":
            turns = [{"content": answer}]
            about = {"question_id": name, "answer_id": f"{generator}-{name}", "model_id": generator, "tstamp": 0.0}
            rows.append(about | {"choices": [{"index": 0, "turns": turns}], "conv_metadata": metadata})
        else:
            said = [{"role": "assistant", "content": {"answer": answer}}]
            about = {"uid": name, "ans_id": f"{generator}-{name}", "model": generator, "tstamp": 0.0}
            rows.append(about | {"messages": [*row["prompt"], *said], "metadata": metadata})
    return rows


def markdown_counts(text: str) -> dict[str, dict[str, int]]:
    """Count headings, list items and bold spans as Arena-Hard's style control does; what stands in code is left out."""
    text = re.sub("```([^`]*)```", "", text)
    headings = {f"h{n}": len(re.findall(rf"^#{{{n}}}\s", text, re.MULTILINE)) for n in range(1, 7)}
    items = {
        "ordered": len(re.findall(r"^\s*\d+\.\s", text, re.MULTILINE)),
        "unordered": len(re.findall(r"^\s*[-*+]\s", text, re.MULTILINE)),
    }
    bold = {"**": len(re.findall(r"\*\*[^*\n]+\*\*", text)), "__": len(re.findall(r"__[^_\n]+__", text))}
    return {"header_count": headings, "list_count": items, "bold_count": bold}


def dumps(rows: Sequence[Mapping[str, Any]], *, lines: bool) -> str:
    """Write rows as a JSON array, or one a line."""
    if lines:
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return json.dumps(list(rows), indent=2, ensure_ascii=False) + "\n"


RAW, CONTROLLED = "win_rate", "length_controlled"


def read_annotations(path: Path) -> list[dict[str, Any]]:
    """Return the annotations of one model.

    Raises:
        UsageError: for a file that is not of AlpacaEval's form, of several models, or a preference out of range.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: not readable as JSON ({error}); give AlpacaEval's annotations.json") from error
    needed = {"instruction", "output_1", "output_2", "preference"}
    if (
        not isinstance(rows, list)
        or not rows
        or not all(isinstance(row, dict) and needed <= row.keys() for row in rows)
    ):
        raise UsageError(f"{path}: not AlpacaEval's annotations: a list of objects with {', '.join(sorted(needed))}")
    models = {str(row.get("generator_2", "")) for row in rows}
    if len(models) > 1:
        raise UsageError(f"{path}: annotations of several models ({', '.join(sorted(models))}); give one file a model")
    for number, row in enumerate(rows, start=1):
        value = row["preference"]
        if value is not None and not (
            isinstance(value, int | float) and (value == 0 or 1 <= value <= 2 or math.isnan(value))
        ):
            raise UsageError(f"{path}: annotation {number}: preference {value!r}; allowed: 1 to 2, or 0 for a draw")
    return rows


def preferences(rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Return the model's preferences in [0, 1], shape (num_rows,); NaN where the judge gave none."""
    coded = np.array([math.nan if row["preference"] is None else float(row["preference"]) for row in rows])
    return np.where(coded == 0, 0.5, coded - 1)


def differences(rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Return the model's characters minus the baseline's, shape (num_rows,)."""
    return np.array([float(len(row["output_2"] or "") - len(row["output_1"] or "")) for row in rows])


def annotation_scores(runs: Mapping[tuple[str, int], Path]) -> pd.DataFrame:
    """Return scores in long form of several models' annotations, by (arm, seed): `win_rate` and `length_controlled`.

    The length-controlled ones leave out the instruction difficulty, which AlpacaEval publishes on the Hub alone.
    """
    frames = []
    for (arm, seed), path in runs.items():
        rows = read_annotations(path)
        given, lengths = preferences(rows), differences(rows)
        known = ~np.isnan(given)
        values = np.full(len(rows), math.nan)
        values[known] = length_controlled(given[known], lengths[known]).pseudo_values
        for scorer, scores in ((RAW, given), (CONTROLLED, values)):
            frames.append(_frame(arm, seed, rows, scorer, scores))
    return pd.concat(frames, ignore_index=True)


def _frame(arm: str, seed: int, rows: Sequence[Mapping[str, Any]], scorer: str, scores: np.ndarray) -> pd.DataFrame:
    ids = [prompt_id([{"role": "user", "content": str(row["instruction"])}]) for row in rows]
    frame = pd.DataFrame({"prompt_id": ids, "score": scores, "chars": [len(row["output_2"] or "") for row in rows]})
    # AlpacaEval asks a few instructions twice: each time is a prompt of its own.
    again = frame.groupby("prompt_id").cumcount()
    frame["cluster"] = frame["prompt_id"]
    frame["prompt_id"] = frame["prompt_id"].where(again == 0, frame["prompt_id"] + "#" + again.astype(str))
    frame["unscored_reason"] = np.where(frame["score"].isna(), "the judge gave no preference", "")
    fixed: dict[str, Any] = {
        "arm": arm,
        "config": "given",
        "seed": seed,
        "split": "golden",
        "scorer": scorer,
        "stage": "confirm",
    }
    return frame.assign(**fixed, flag="", tokens=None).reindex(columns=list(SCORE_COLUMNS))


CONFIG = "given"
GIVEN = "given answers"  # in the place of a model
_MAX_BAD = 0.01


@dataclass(frozen=True)
class Question:
    """What the study asks: the metric that decides, the margin and the error rate."""

    metric: str
    margin: float = MARGIN
    alpha: float = ALPHA


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
    guards: list[Guard] = []
    looks: list[int] = []
    fixed = {
        "metric": question.metric,
        "margin": question.margin,
        "alpha": question.alpha,
        "guards": guards,
        "looks": looks,
        "golden": facts["sha256"],
    }
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
            "metric": question.metric,
            "margin": question.margin,
            "alpha": question.alpha,
            "guards": guards,
            "looks": looks,
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
    manifest: Manifest = {
        "trial_id": folder.name,
        "arm": arm,
        "config": CONFIG if arm != "sft" else "base",
        "seed": seed,
        "status": "complete",
        "flags": [],
        "done": ["golden", "score"],
        "warnings": [],
        "base_sha256": "",
        "source": {"sha256": file_sha256(Path(path))},
        "seconds": {},
        "files": fingerprints(folder, {}),
    }
    write_manifest(folder, manifest)
