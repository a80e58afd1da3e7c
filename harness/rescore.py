"""Score what is stored of a study again, or with more scorers. Trains nothing and generates nothing.

Command: `python -m harness.score results/STUDY [SCORER ...] [score.KEY=VALUE ...] [trust_study=true]`.
What is used of the settings that lie in the study itself: `harness.trust`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.checkpoint import checkpoint_dir
from harness.manifest import load_manifest
from harness.outside import in_one_sentence
from harness.ownscorer import is_file, scorer_name
from harness.records import UsageError, locked, read_jsonl, write_json
from harness.redaction import redact
from harness.registration import read_study
from harness.rescoresettings import NOTE, Settings, read_settings
from harness.score import collect_scores, score_trial, trial_folders
from harness.scoreconfig import ScoreConfig
from harness.scorers import SCORERS
from harness.scoring import BENCHMARKS, COMPARING, Scoring, run_names, score_problems
from harness.stages import done_stages
from harness.studyscore import score_study


def rescore(study: Path, scorers: Sequence[str], overrides: Sequence[str] = ()) -> tuple[Path, list[str]]:
    """Score all stored outputs of a study again.

    Args:
        study: its folder.
        scorers: names, or Python files; empty for those that need nothing but what is stored.
        overrides: `score.KEY=VALUE`, on top of what the study was scored with before; `trust_study=true`, where the
            addresses, variables and files that its folder names are right.

    Returns:
        The path of scores.csv, and a sentence for each scorer that failed.

    Raises:
        UsageError: for a folder that is no study, a file in it that is damaged or lost, or wrong settings.
    """
    names = list(scorers) or list(SCORERS)
    _refuse_unknown(names)
    if not (study / "prompts.jsonl").is_file() or not (study / "study.yaml").is_file():
        raise UsageError(f"{study}: no scored study; give a folder under results/ that harness.sweep wrote")
    registered = read_study(study / "study.yaml")
    wide = [name for name in names if name not in SCORERS]
    settings = read_settings(study, overrides, wide)
    wide = run_names(settings.score, wide) if wide else []
    problems = list(score_problems(settings.score, wide))
    if problems:
        raise UsageError("\n".join(problems))
    _refuse_change(registered, settings.score, wide)
    with locked(study):
        _score_trials(study, [name for name in names if name in SCORERS], registered)
        failed = score_study(study, _scoring(study, settings, wide)) if wide else []
        if wide:
            write_json(study / NOTE, {"settings": settings.noted})
        return collect_scores(study), failed


def _refuse_unknown(names: Sequence[str]) -> None:
    known = (*SCORERS, *COMPARING, BENCHMARKS)
    unknown = [name for name in names if name not in known and not is_file(name)]
    if unknown:
        raise UsageError(f"unknown scorer {', '.join(unknown)}; allowed: {', '.join(known)}, or a Python file of yours")


def _refuse_change(registered: dict[str, Any], config: ScoreConfig, names: Sequence[str]) -> None:
    """Refuse other settings for a scorer that decides than those that were registered."""
    fixed = registered.get("fixed", {}).get("score") or {}
    judge = fixed.get("judge")
    if (
        "judge" in names
        and judge
        and (judge["model"], judge["base_url"]) != (config.judge.model, config.judge.base_url)
    ):
        raise UsageError(
            f"score.judge.model={config.judge.model}: this study is decided by the judge {judge['model']} at "
            f"{judge['base_url'] or 'the default endpoint'}, registered before the first trial; judge it by another "
            "one in a study of its own, study=NAME (finished trials of the same config train again there)"
        )


def _scoring(study: Path, settings: Settings, names: Sequence[str]) -> Scoring:
    model: dict[str, Any] = {}
    if BENCHMARKS in names:
        model = {"folder": str(checkpoint_dir(settings.model)), "chat_template": settings.model.chat_template}
        model["quantise"] = settings.is_quantised
    tuned = any(row["split"] == "dev" for row in read_jsonl(study / "prompts.jsonl")) and bool(
        read_study(study / "study.yaml").get("tuned")
    )
    metric = read_study(study / "study.yaml")["metric"]
    decides = metric in [scorer_name(name) for name in names]
    splits = ["dev", "golden"] if tuned and decides else ["golden"]
    return Scoring(settings.score, names, splits, study.parent / ".cache", model)


def _score_trials(study: Path, names: Sequence[str], registered: dict[str, Any]) -> None:
    base, command = study / "base", registered.get("command", "python -m harness.sweep ...")
    try:
        prompts = list(read_jsonl(study / "prompts.jsonl"))
        manifests = {folder: load_manifest(folder) for folder in trial_folders(study)}
        if base not in manifests:
            raise ValueError(f"{base}: the SFT base, which every arm is measured against, is not there")
        for folder, manifest in manifests.items():
            lost = set(manifest["done"]) - done_stages(folder, manifest) - {"score"}
            if lost:
                raise ValueError(f"{folder}: the files of {', '.join(sorted(lost))} are damaged or lost")
            if manifest["status"] != "running" and names:
                score_trial(folder, prompts, names, base=base if folder != base else None)
    except ValueError as error:
        raise UsageError(f"{error}\nTo mend it, run the study's command again: {command}") from error


@in_one_sentence("harness.score")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m harness.score",
        description="Score the stored completions and log-probs of a study; trains nothing, generates nothing.",
        epilog="Example: python -m harness.score results/my-study judge length_controlled score.judge.model=NAME "
        "score.judge.base_url=http://127.0.0.1:8000/v1",
    )
    allowed = ", ".join((*SCORERS, *COMPARING, BENCHMARKS))
    parser.add_argument("study", type=Path, help="a folder under results/")
    parser.add_argument(
        "scorers",
        nargs="*",
        metavar="SCORER",
        help=f"out of {allowed}, or a Python file of yours; default: those that need nothing but what is stored; "
        "beside them score.KEY=VALUE, and trust_study=true to use addresses, variables and files that the study names",
    )
    arguments = parser.parse_args(argv)
    overrides = [text for text in arguments.scorers if "=" in text]
    names = [text for text in arguments.scorers if "=" not in text]
    try:
        path, failed = rescore(arguments.study, names, overrides)
    except UsageError as error:
        print(f"harness.score: {redact(error)}", file=sys.stderr)
        return 2
    for problem in failed:
        print(f"scorer failed: {redact(problem)}", file=sys.stderr)
    print(f"{path}\nNow: python -m harness.decide {arguments.study}")
    return 1 if failed else 0
