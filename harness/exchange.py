"""To and from other tools: answers for AlpacaEval and Arena-Hard, and answers or annotations that were made elsewhere.

Command: `python -m harness.exchange export | annotations | judgments | outputs ...`. Imports no torch.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness.config.arms import ARMS, BASE
from harness.data.inputs import prompt_row
from harness.data.reasoning import part
from harness.data.records import Completion
from harness.data.splits import evaluation_prompts
from harness.data.table import read_table
from harness.data.unicode import count_words
from harness.score.annotations import (
    GIVEN_CONFIG,
    RunKey,
    annotation_scores,
    measurement_notes,
    read_all_annotations,
    read_alpaca_files,
    thinking_notes,
)
from harness.score.answers import read_outputs
from harness.score.judgments import SCORER, judgment_notes, judgment_scores, read_all_judgments
from harness.score.trial_scores import completion_row, trial_folders
from harness.study.errors import UsageError, in_one_sentence
from harness.study.files import digest, file_sha256, read_jsonl, write_jsonl, write_text
from harness.study.integrity import fingerprints
from harness.study.manifest import Manifest, load_manifest, write_manifest
from harness.study.registration import ALPHA, MARGIN, RULE_VERSION, Registration, contrast_of, write_study
from harness.study.rows import CompletionRow, PromptRow
from harness.study.scores_csv import to_csv
from harness.study.text import one_line

GIVEN = "given answers"  # study.yaml's model of a study of given answers
_MAX_BAD = 0.01
_RUN = re.compile(r"([a-z][a-z0-9_-]*)(?::(\d+))?=(.+)")


@dataclass(frozen=True)
class Question:
    """The question of a study: the metric that decides, the margin and the error rate."""

    metric: str
    margin: float = MARGIN
    alpha: float = ALPHA


@in_one_sentence("harness.exchange")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m harness.exchange", description=__doc__.split("\n", maxsplit=1)[0])
    commands = parser.add_subparsers(required=True, metavar="export | annotations | judgments | outputs")
    one = commands.add_parser("export", help="write golden answers for AlpacaEval or Arena-Hard")
    one.add_argument("study", type=Path)
    one.add_argument("--form", choices=("alpaca_eval", "arena_hard"), required=True)
    one.add_argument("--out", type=Path, help="default: STUDY/exports")
    one.set_defaults(run=_export)
    one = commands.add_parser("annotations", help="turn AlpacaEval's annotations.json into a scores file")
    one.add_argument("runs", nargs="+", metavar="ARM[:SEED]=FILE")
    one.add_argument("--difficulty", metavar="FILE", help="AlpacaEval's instruction_difficulty.csv")
    one.add_argument("--gamed", metavar="FILE", help="AlpacaEval's df_gamed.csv: with both, the leaderboard's fit")
    one.add_argument("--out", type=Path, required=True)
    one.set_defaults(run=_annotations)
    one = commands.add_parser("judgments", help="turn Arena-Hard's model_judgment files into a scores file")
    one.add_argument("runs", nargs="+", metavar="ARM[:SEED]=FILE")
    one.add_argument("--category", help="hard_prompt or creative_writing, where the files hold several")
    one.add_argument("--out", type=Path, required=True)
    one.set_defaults(run=_judgments)
    one = commands.add_parser("outputs", help="make a study of answers that were made elsewhere, to score and decide")
    one.add_argument("study", type=Path, help="a folder that is not there yet, such as results/given")
    one.add_argument("runs", nargs="+", metavar="ARM[:SEED]=FILE")
    one.add_argument("--golden", required=True, help="the golden set that was answered")
    one.add_argument("--baseline", required=True, help="the answers that both arms are compared with")
    one.add_argument("--metric", default="judge", help="what decides (default judge)")
    one.add_argument("--margin", type=float, default=MARGIN)
    one.add_argument("--alpha", type=float, default=ALPHA)
    one.set_defaults(run=_outputs)
    options = parser.parse_args(argv)
    run: Callable[[argparse.Namespace], str] = options.run
    try:
        print(run(options))
    except UsageError as error:
        print(f"harness.exchange: {error}", file=sys.stderr)
        return 2
    return 0


def _export(options: argparse.Namespace) -> str:
    written = export(options.study, options.form, options.out or options.study / "exports")
    return "\n".join(map(str, written))


def _annotations(options: argparse.Namespace) -> str:
    runs = {key: Path(path) for key, path in _read_runs(options.runs).items()}
    files = read_alpaca_files(options.difficulty, options.gamed)
    rows = read_all_annotations(runs)
    write_text(options.out, to_csv(annotation_scores(rows, files, runs)))
    notes = [*measurement_notes(rows), *thinking_notes(rows)]
    return _what_next(options.out, list(runs), ["win_rate", files.scorer], notes)


def _judgments(options: argparse.Namespace) -> str:
    runs = {key: Path(path) for key, path in _read_runs(options.runs).items()}
    found = read_all_judgments(runs, options.category)
    write_text(options.out, to_csv(judgment_scores(found, runs)))
    return _what_next(options.out, list(runs), [SCORER], list(judgment_notes(found)))


def _what_next(out: Path, runs: Sequence[RunKey], metrics: Sequence[str], notes: Sequence[str]) -> str:
    """Return what a command prints about the scores file that it has written."""
    arms = ",".join(dict.fromkeys(arm for arm, _ in runs))
    decide = f"Now: python -m harness.decide {out} --metric {metrics[0]} --arms {arms}"
    others = [f"(or --metric {name})" for name in metrics[1:]]
    return "\n".join([*notes, str(out), " ".join([decide, *others])])


def _outputs(options: argparse.Namespace) -> str:
    command = shlex.join(["python", "-m", "harness.exchange", *sys.argv[1:]])
    question = Question(options.metric, options.margin, options.alpha)
    study = adopt(options.study, options.golden, _read_runs(options.runs), options.baseline, question, command)
    return f"{study}\nNow: python -m harness.score {study} {options.metric} ...; python -m harness.decide {study}"


def _read_runs(given: Sequence[str]) -> dict[RunKey, str]:
    """Parse `ARM[:SEED]=FILE` words."""
    runs: dict[RunKey, str] = {}
    for text in given:
        match = _RUN.fullmatch(text)
        if not match:
            raise UsageError(
                f"{text}: write ARM=FILE, or ARM:SEED=FILE for each of several seeds, as simpo:1=a.json; an arm's name "
                "is a small letter, then small letters, digits, _ and -"
            )
        key = (match[1], int(match[2] or 0))
        if key in runs:
            raise UsageError(f"{text}: {match[1]} seed {key[1]} is given twice; number the seeds, as {match[1]}:2=FILE")
        if not Path(match[3]).is_file():
            raise UsageError(f"{text}: no such file")
        runs[key] = match[3]
    return runs


def export(study: Path, form: str, out: Path) -> list[Path]:
    """Write the golden answers of the base and of every run for another tool.

    Args:
        study: its folder.
        form: `alpaca_eval` (GENERATOR/model_outputs.json) or `arena_hard` (model_answer/GENERATOR.jsonl).
        out: the folder to write into; a generator is called ARM-sSEED, or `sft`.

    Raises:
        UsageError: for a folder that is no study, or one whose golden set is not Arena-Hard's.
    """
    if not (study / "prompts.jsonl").is_file():
        raise UsageError(f"{study}: no study with answers; give a folder under results/ that harness.sweep wrote")
    prompts: list[PromptRow] = [row for row in read_jsonl(study / "prompts.jsonl") if row["split"] == "golden"]
    written = []
    for folder in trial_folders(study):
        path = folder / "completions.jsonl"
        rows = [row for row in read_jsonl(path) if row["split"] == "golden"] if path.is_file() else []
        if not rows:
            continue
        name = _generator(folder)
        answers = {row["prompt_id"]: row["completion"] for row in rows}
        if form == "alpaca_eval":
            target = out / name / "model_outputs.json"
            text = json.dumps(alpaca_eval_rows(prompts, answers, name), indent=2, ensure_ascii=False) + "\n"
        else:
            found = arena_hard_rows(prompts, answers, name, {row["prompt_id"]: row["tokens"] for row in rows})
            if not found:
                raise UsageError(f"{study}: its golden set is not Arena-Hard's: its tools know none of these prompts")
            target = out / "model_answer" / f"{name}.jsonl"
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found)
        write_text(target, text)
        written.append(target)
    if not written:
        raise UsageError(f"{study}: no golden answers yet; finish the study first")
    return written


def _generator(folder: Path) -> str:
    """Return the name of a run, which becomes the name of a file."""
    manifest = load_manifest(folder)
    name = BASE if folder.name == "base" else f"{manifest['arm']}-s{manifest['seed']}"
    if not re.fullmatch(r"[\w-]+", name):
        raise UsageError(f"{folder}: {one_line(name, 80)} is no name of a run; allowed: letters, digits, _ and -")
    return name


def alpaca_eval_rows(prompts: Sequence[PromptRow], answers: Mapping[str, str], generator: str) -> list[dict[str, str]]:
    """Return AlpacaEval's model_outputs: one object per prompt, in the order of the golden file."""
    return [
        {
            "dataset": str(row["about"].get("dataset", "")),
            "instruction": row["prompt"][-1]["content"],
            "output": answers[row["prompt_id"]],
            "generator": generator,
        }
        for row in prompts
        if row["prompt_id"] in answers and not row.get("follows")
    ]


def arena_hard_rows(
    prompts: Sequence[PromptRow], answers: Mapping[str, str], generator: str, tokens: Mapping[str, int]
) -> list[dict[str, Any]]:
    """Return the rows of Arena-Hard's model_answer file, in the golden file's version of the format."""
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
            said = {"role": "assistant", "content": {"answer": answer}}
            about = {"uid": name, "ans_id": f"{generator}-{name}", "model": generator, "tstamp": 0.0}
            rows.append(about | {"messages": [*row["prompt"], said], "metadata": metadata})
    return rows


def markdown_counts(text: str) -> dict[str, dict[str, int]]:
    """Count headings, list items and bold spans outside of code, as Arena-Hard's style control does."""
    text = re.sub("```([^`]*)```", "", text)
    headings = {f"h{n}": len(re.findall(rf"^#{{{n}}}\s", text, re.MULTILINE)) for n in range(1, 7)}
    items = {  # Arena-Hard's `^\s*` runs over empty lines, to the same counts in quadratic time
        "ordered": len(re.findall(r"^[^\S\n]*\d+\.\s", text, re.MULTILINE)),
        "unordered": len(re.findall(r"^[^\S\n]*[-*+]\s", text, re.MULTILINE)),
    }
    bold = {"**": len(re.findall(r"\*\*[^*\n]+\*\*", text)), "__": len(re.findall(r"__[^_\n]+__", text))}
    return {"header_count": headings, "list_count": items, "bold_count": bold}


def adopt(
    study: Path, golden: str, runs: Mapping[RunKey, str], baseline: str, question: Question, command: str
) -> Path:
    """Build a study folder from answers of other tools, so that score and decide can run on it.

    Args:
        study: its folder, which must not exist yet.
        golden: the golden set, in any form that `data.golden` reads.
        runs: files of answers by arm and seed.
        baseline: file of the answers that every arm is compared with, in place of an SFT base's.
        question: metric, margin and error rate.
        command: the command line, for the report.

    Raises:
        UsageError: for a study that exists, an unknown arm, a single arm, or answers that do not fit the golden set.
    """
    if study.exists():
        raise UsageError(f"{study}: exists already; give another folder")
    arms = list(dict.fromkeys(arm for arm, _ in runs))
    trained = [name for name, arm in ARMS.items() if arm.trainer]
    if len(arms) < 2 or not set(arms) <= set(trained):
        raise UsageError(
            f"arms {', '.join(arms) or 'none'}: give answers of two arms out of {', '.join(trained)}, as simpo:1=FILE"
        )
    table = read_table(golden, key="data.golden", revision=None, max_bad_fraction=_MAX_BAD)
    prompts = [prompt_row("golden", prompt, 0) for prompt in evaluation_prompts(table.rows)]
    answers = {key: read_outputs(path, prompts, key=f"{key[0]}:{key[1]}") for key, path in runs.items()}
    base = read_outputs(baseline, prompts, key="--baseline")
    for name, found in (*answers.items(), ("--baseline", base)):
        lacking = len(prompts) - len(found)
        if lacking:
            raise UsageError(f"{name}: no answer to {lacking} of {len(prompts)} golden prompts; answer all of them")
    facts = table.facts | {"prompts": len(prompts)}
    write_study(study / "study.yaml", _registration(study.name, arms, list(runs), facts, question, command))
    write_jsonl(study / "prompts.jsonl", prompts)
    _write_run(study / "base", (BASE, 0), prompts, base, baseline)
    for key, found in answers.items():
        name = digest([*key, file_sha256(Path(runs[key]))])[:12]
        _write_run(study / "trials" / name, key, prompts, found, runs[key])
    return study


def _registration(
    name: str, arms: list[str], runs: Sequence[RunKey], facts: dict[str, Any], question: Question, command: str
) -> Registration:
    fixed = {
        "metric": question.metric,
        "margin": question.margin,
        "alpha": question.alpha,
        "guards": [],
        "looks": [],
        "golden": facts["sha256"],
    }
    return {
        "study": name,
        "question": "Which of the given answers are better?",
        "arms": arms,
        "contrast": contrast_of(arms),
        "configs": {arm: [GIVEN_CONFIG] for arm in arms},
        "seeds": {arm: [seed for one, seed in runs if one == arm] for arm in arms},
        "tuned": [],
        "tuning_seeds": [],
        "metric": question.metric,
        "margin": question.margin,
        "alpha": question.alpha,
        "guards": [],
        "looks": [],
        "rule_version": RULE_VERSION,
        "family": {},
        "model": {"path": GIVEN, "revision": None, "base_sha256": ""},
        "data": {"golden": facts},
        "warnings": ["the answers were made elsewhere: how their policies were trained and tuned is not known here"],
        "command": command,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "fixed": fixed,
        "fixed_sha256": digest(fixed),
    }


def _write_run(folder: Path, key: RunKey, prompts: Sequence[PromptRow], answers: Mapping[str, str], path: str) -> None:
    """Write one run: its answers, no pairs, and a manifest that names the file of the answers."""
    write_jsonl(folder / "completions.jsonl", [_completion(row, answers[row["prompt_id"]]) for row in prompts])
    write_jsonl(folder / "pairs.jsonl", [])
    write_jsonl(folder / "scores.jsonl", [])
    arm, seed = key
    manifest: Manifest = {
        "trial_id": folder.name,
        "arm": arm,
        "config": GIVEN_CONFIG if arm != BASE else "base",
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


def _completion(row: PromptRow, answer: str) -> CompletionRow:
    """Return an answer's row; its tokens are words, since the tokenizer is not known."""
    parted = part(answer)
    words = count_words(parted.answer)
    thinking = max(1, count_words(parted.thinking)) if parted.spans else 0
    prompt, name = row["prompt"][-1]["content"], row["prompt_id"]
    return completion_row(
        Completion("golden", name, prompt, parted.answer, words, parted.closed, parted.thinking, thinking)
    )


if __name__ == "__main__":
    sys.exit(main())
