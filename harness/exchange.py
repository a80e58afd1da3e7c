"""To and from other tools: answers for AlpacaEval and Arena-Hard, and answers or annotations that were made elsewhere.

Command: `python -m harness.exchange export | annotations | outputs ...`. Imports no torch.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from harness.score.exchange import Question, adopt, alpaca_eval_rows, annotation_scores, arena_hard_rows, dumps
from harness.score.trial_scores import trial_folders
from harness.study.errors import UsageError, in_one_sentence
from harness.study.files import read_jsonl, write_text
from harness.study.manifest import load_manifest
from harness.study.registration import ALPHA, MARGIN
from harness.study.scores_csv import write_scores
from harness.study.text import one_line

_RUN = re.compile(r"([a-z_]+)(?::(\d+))?=(.+)")


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
    prompts = [row for row in read_jsonl(study / "prompts.jsonl") if row["split"] == "golden"]
    written = []
    for folder in trial_folders(study):
        manifest, path = load_manifest(folder), folder / "completions.jsonl"
        rows = [row for row in read_jsonl(path) if row["split"] == "golden"] if path.is_file() else []
        if not rows:
            continue
        name = "sft" if folder.name == "base" else f"{manifest['arm']}-s{manifest['seed']}"
        if not re.fullmatch(r"[\w-]+", name):  # it becomes a file's name
            raise UsageError(f"{folder}: {one_line(name, 80)} is no name of a run; allowed: letters, digits, _ and -")
        answers = {row["prompt_id"]: row["completion"] for row in rows}
        if form == "alpaca_eval":
            target, text = (
                out / name / "model_outputs.json",
                dumps(alpaca_eval_rows(prompts, answers, name), lines=False),
            )
        else:
            tokens = {row["prompt_id"]: row["tokens"] for row in rows}
            found = arena_hard_rows(prompts, answers, name, tokens)
            if not found:
                raise UsageError(f"{study}: its golden set is not Arena-Hard's: its tools know none of these prompts")
            target, text = out / "model_answer" / f"{name}.jsonl", dumps(found, lines=True)
        write_text(target, text)
        written.append(target)
    if not written:
        raise UsageError(f"{study}: no golden answers yet; finish the study first")
    return written


def _runs(given: Sequence[str]) -> dict[tuple[str, int], str]:
    runs: dict[tuple[str, int], str] = {}
    for text in given:
        match = _RUN.fullmatch(text)
        if not match:
            raise UsageError(f"{text}: write ARM=FILE, or ARM:SEED=FILE for each of several seeds, as simpo:1=a.json")
        place = (match[1], int(match[2] or 0))
        if place in runs:
            raise UsageError(
                f"{text}: {match[1]} seed {place[1]} is given twice; number the seeds, as {match[1]}:2=FILE"
            )
        if not Path(match[3]).is_file():
            raise UsageError(f"{text}: no such file")
        runs[place] = match[3]
    return runs


def _export(options: argparse.Namespace) -> str:
    written = export(options.study, options.form, options.out or options.study / "exports")
    return "\n".join(map(str, written))


def _annotations(options: argparse.Namespace) -> str:
    runs = {place: Path(path) for place, path in _runs(options.runs).items()}
    scores = annotation_scores(runs)
    write_scores(options.out, scores)
    arms = ",".join(dict.fromkeys(arm for arm, _ in runs))
    return f"{options.out}\nNow: python -m harness.decide {options.out} --metric win_rate --arms {arms}"


def _outputs(options: argparse.Namespace) -> str:
    command = shlex.join(["python", "-m", "harness.exchange", *sys.argv[1:]])
    question = Question(options.metric, options.margin, options.alpha)
    study = adopt(options.study, options.golden, _runs(options.runs), options.baseline, question, command)
    return f"{study}\nNow: python -m harness.score {study} {options.metric} ...; python -m harness.decide {study}"


@in_one_sentence("harness.exchange")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m harness.exchange", description=__doc__.split("\n", maxsplit=1)[0])
    commands = parser.add_subparsers(required=True, metavar="export | annotations | outputs")
    one = commands.add_parser("export", help="write golden answers for AlpacaEval or Arena-Hard")
    one.add_argument("study", type=Path)
    one.add_argument("--form", choices=("alpaca_eval", "arena_hard"), required=True)
    one.add_argument("--out", type=Path, help="default: STUDY/exports")
    one.set_defaults(run=_export)
    one = commands.add_parser("annotations", help="turn AlpacaEval's annotations.json into a scores file")
    one.add_argument("runs", nargs="+", metavar="ARM[:SEED]=FILE")
    one.add_argument("--out", type=Path, required=True)
    one.set_defaults(run=_annotations)
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


if __name__ == "__main__":
    sys.exit(main())
