"""Check a study: missing, changed and foreign files, outdated scores, a verdict that the scores do not give.

Command: `python -m harness.verify results/STUDY`. Changes nothing. Imports no torch.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import pandas as pd

from harness.config.trial_id import stored_trial_id
from harness.decide.rule import verdict
from harness.decide.study import Decision, decision
from harness.decide.version_1 import by_version_1
from harness.decide.words import plural
from harness.exchange import GIVEN
from harness.score.trial_scores import scores_again
from harness.study.backup import NAMES, equals_backup
from harness.study.decision import VERDICT_FILE
from harness.study.errors import UsageError, in_one_sentence
from harness.study.files import SEAL, Json, Reader, file_sha256
from harness.study.integrity import JOBS, WEIGHTS, is_outdated, leads_out
from harness.study.manifest import FILE as MANIFEST_FILE
from harness.study.manifest import Manifest, data_identity, is_as_written, read_manifest
from harness.study.registration import Registration, read_study
from harness.study.scores_csv import SCORES_FILE, read_scores_csv, written_and_read
from harness.study.text import one_line

_TRIAL_FILES = {
    "config.yaml", "manifest.json", "train.jsonl", "completions.jsonl", "pairs.jsonl", "scores.jsonl", "failure.json",
    "earlier_failure.json", "preferences.jsonl", "benchmarks.jsonl", "live.jsonl", "log.txt", ".lock",
}  # fmt: skip
_TRIAL_FOLDERS = {*WEIGHTS, "checkpoints", ".twins"}
_STUDY_FILES = {
    "study.yaml", "prompts.jsonl", "scores.csv", "verdict.json", "report.html", "report.md", "ledger.jsonl",
    "selection.json", "micro_batch.json", "scoring.json", "judge.json", "length_controlled.json",
    "own_scorers.json", ".lock",
}  # fmt: skip
_STUDY_FOLDERS = {"base", "trials", "costs", "figures", "wandb", "exports", ".twins", ".submitit", JOBS}
_ALL_RIGHT = (
    "all as the sweep left it (hashes, ids, scores, verdict; the report's pages and W&B's files are not checked)"
)
_FINISHED = ("complete", "diverged")
# Of a verdict by version 1 of the rule, what version 2 reckons alike.
_BOTH_VERSIONS = (
    "level", "difference", "metric", "arms", "margin", "alpha", "configs", "n_prompts", "n_seeds", "n_unscored",
    "means", "run_means",
)  # fmt: skip


def verify_study(study: Path) -> list[str]:
    """Return one sentence per problem; empty for a study as the sweep left it.

    Raises:
        UsageError: where the folder is not a study.
    """
    if not (study / "study.yaml").is_file():
        raise UsageError(f"{study}: no study.yaml; give a folder that harness.sweep wrote")
    try:
        registered = read_study(study / "study.yaml")
    except UsageError as error:
        return [str(error)]
    problems = list(_foreign_entries(study, _STUDY_FILES, _STUDY_FOLDERS))
    problems += [
        f"trials/{path.name} is foreign: no stage writes it" for path in study.glob("trials/*") if path.is_file()
    ]
    problems += [f"{name} differs from its backup copy" for name in NAMES if not equals_backup(study / name)]
    folders = [path for path in [study / "base", *sorted((study / "trials").glob("*"))] if path.is_dir()]
    for folder in [*folders, *sorted(path for path in study.glob("costs/*") if path.is_dir())]:
        problems += [f"{folder.relative_to(study)}: {text}" for text in _trial_problems(study, folder, registered)]
    problems += _run_problems(study, registered)
    if registered["model"]["path"] != GIVEN:
        problems += [f"identical data: {reason}" for reason in data_identity(study)["reasons"]]
    return [*problems, *_score_problems(study, folders), *_verdict_problems(study)]


def _trial_problems(study: Path, folder: Path, registered: Registration) -> Iterator[str]:
    reader = Reader(study)
    stored = reader.mapping(folder / MANIFEST_FILE)
    yield from reader.problems
    if not stored:
        yield "foreign or unfinished: it has no manifest; the sweep's command finishes it, if it is one of its trials"
        return
    if not is_as_written(stored):
        yield "manifest.json was changed: its content is not believed, and its files are not checked"
        return
    if SEAL not in stored:
        yield "manifest.json holds no hash of itself: somebody took it out"
    manifest = read_manifest(folder)
    if folder.parent.name == "trials" and folder.name != manifest.get("trial_id"):
        yield f"the folder was renamed: its manifest is of trial {manifest.get('trial_id')}"
    if (found := manifest.get("base_sha256")) != (base := registered["model"]["base_sha256"]):
        yield f"it started from another base ({str(found)[:12]}) than the registered one ({base[:12]})"
    if manifest.get("status") not in _FINISHED:
        yield f"it is {manifest.get('status')}: run the sweep's command again"
    if is_outdated(study, manifest.get("seed"), size := manifest.get("micro_batch_size")):
        yield f"it was trained with a micro-batch of {size}, and another trial of its seed with a smaller one"
    yield from _config_problems(reader.mapping(folder / "config.yaml"), manifest, registered)
    yield from _file_problems(folder, manifest)


def _run_problems(study: Path, registered: Registration) -> Iterator[str]:
    """Compare the runs in the folder with those that study.yaml registered."""
    found = set()
    for folder in sorted(path for path in (study / "trials").glob("*") if path.is_dir()):
        run = read_manifest(folder)
        if not run:
            continue
        arm, config, seed = run["arm"], run["config"], run["seed"]
        found.add((arm, seed))
        seeds = [*registered["seeds"].get(arm, []), *registered["tuning_seeds"]]
        if config not in registered["configs"].get(arm, []) or seed not in seeds:
            yield f"trials/{folder.name}: {arm} {config} seed {seed} is foreign: study.yaml did not register it"
    for arm, registered_seeds in registered["seeds"].items():
        begun = registered_seeds[: min(registered["looks"], default=len(registered_seeds))]
        missing = [str(seed) for seed in begun if (arm, seed) not in found]
        if missing and (study / VERDICT_FILE).is_file():
            yield f"{arm}: there is no trial of the registered seed {', '.join(missing)}"


def _config_problems(config: Mapping[str, Any], manifest: Manifest, registered: Registration) -> Iterator[str]:
    """Compare a trial's id with that of its config and the registered data; adopted answers have no config."""
    if not config:
        return
    try:
        found = stored_trial_id(config, registered["fixed"]["contents"])
    except (KeyError, AttributeError, TypeError) as error:
        yield f"config.yaml is no config of a trial ({type(error).__name__}: {error})"
        return
    if found != manifest.get("trial_id"):
        yield f"config.yaml and the study's data give trial {found}, the manifest {manifest.get('trial_id')}"


def _file_problems(folder: Path, manifest: Manifest) -> Iterator[str]:
    known = manifest.get("files", {})
    if not known and manifest.get("status") in _FINISHED:
        yield "no hashes are recorded: its files cannot be checked"
    for name, record in known.items():
        path = folder / name
        if leads_out(name):
            yield f"manifest.json names {one_line(name, 200)}, which is not in the folder: it is not read"
        elif not path.is_file():
            yield f"{name} is missing"
        elif file_sha256(path) != record["sha256"]:
            yield f"{name} was changed"
    yield from _foreign_entries(folder, _TRIAL_FILES, _TRIAL_FOLDERS)
    weights = [path for name in WEIGHTS for path in (folder / name).rglob("*") if path.is_file()]
    for path in weights if known else ():
        if (name := path.relative_to(folder).as_posix()) not in known:
            yield f"{name} is foreign: no stage writes it"


def _foreign_entries(folder: Path, files: Set[str], folders: Set[str]) -> Iterator[str]:
    for path in sorted(folder.iterdir()):
        if path.name not in (folders if path.is_dir() else files):
            yield f"{path.name} is foreign: no stage writes it"


def _score_problems(study: Path, folders: Sequence[Path]) -> Iterator[str]:
    """Score the stored answers again and compare; then compare scores.csv with the trials' scores."""
    reader = Reader(study)
    prompts: list[Any] = list(reader.rows(study / "prompts.jsonl"))
    stored: list[dict[str, Any]] = []
    for folder in folders:
        rows = reader.rows(folder / "scores.jsonl")
        stored += rows
        try:
            again = scores_again(folder, prompts, study / "base")
        except (OSError, ValueError, KeyError, TypeError, UsageError) as error:
            yield f"{folder.relative_to(study)}: its answers cannot be scored again ({type(error).__name__}: {error})"
            continue
        now = {(row["split"], row["prompt_id"], row["scorer"]): row["score"] for row in rows}
        stale = sum(now.get(key, "absent") != score for key, score in again.items())
        if rows and stale:
            yield f"{folder.relative_to(study)}: {stale} of {len(again)} scores are not those of its answers: stale"
    yield from reader.problems
    yield from _csv_problems(study / SCORES_FILE, stored)


def _csv_problems(path: Path, stored: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if not path.is_file():
        yield from ["scores.csv is missing"] if stored else []
        return
    try:
        found = read_scores_csv(path)
    except ValueError as error:
        yield f"scores.csv: {error}"
        return
    expected = written_and_read(pd.DataFrame(list(stored)).reindex(columns=found.columns))
    if not expected.equals(found):
        yield "scores.csv is not what the trials' scores.jsonl say: stale, or changed"


def _verdict_problems(study: Path) -> Iterator[str]:
    """Decide again in memory and compare with verdict.json."""
    reader = Reader(study)
    stored = reader.mapping(study / VERDICT_FILE)
    yield from reader.problems
    if not stored:
        return
    try:
        decided = decision(study)
        expected = decided.verdict if "rule_version" in stored else _as_version_1(decided)
    except UsageError as error:
        yield f"verdict.json: the scores cannot be decided on now: {error}"
        return
    again: dict[str, Any] = json.loads(json.dumps(expected))
    # Both also hold the ledger's warnings, which a second look would change.
    warned = [*(stored.pop("warnings", None) or ()), *(stored.pop("caveats", None) or ())]
    lacking = [text for key in ("warnings", "caveats") for text in again.pop(key, ()) if text not in warned]
    if lacking:
        yield f"verdict.json: lacks the warning {one_line(lacking[0], 200)}: stale, or changed"
    keys = dict.fromkeys([*again, *stored]) if "rule_version" in stored else again
    for key in keys:
        if not _is_same(stored.get(key), again.get(key)):
            was, now = one_line(stored.get(key), 200), one_line(again.get(key), 200)
            yield f"verdict.json: {key} is {was}, and the scores give {now}: stale, or changed"


def _as_version_1(decided: Decision) -> dict[str, Json]:
    """Return what a verdict by version 1 of the rule holds, but for what version 2 alone reckons."""
    found, registered, scores = decided.verdict, decided.registered, decided.runs.scores
    metric, margin, alpha, arms = found["metric"], found["margin"], found["alpha"], (found["arms"][0], found["arms"][1])
    word, ends = by_version_1(scores, metric=metric, margin=margin, alpha=alpha, arms=arms)
    # By the scores alone: version 1 did not know the answers' hashes, by which version 2 finds copies.
    plain = verdict(scores, metric=metric, margin=margin, alpha=alpha, arms=arms, others=())
    held: dict[str, Json] = json.loads(
        json.dumps({key: value for key, value in plain.items() if key in _BOTH_VERSIONS})
    )
    level = "method" if plain["level"] == "config" else plain["level"]  # version 1 did not know the level of configs
    guarded = {} if registered.get("guards") and word in arms else {"verdict": word}
    return {**held, **guarded, "level": level, "ci95": list(ends)}


def _is_same(stored: Json, again: Json) -> bool:
    """Return whether two values of verdict.json are equal, numbers but for rounding."""
    if isinstance(stored, list) and isinstance(again, list):
        return len(stored) == len(again) and all(map(_is_same, stored, again))
    if isinstance(stored, dict) and isinstance(again, dict):
        return stored.keys() == again.keys() and all(_is_same(stored[key], again[key]) for key in stored)
    if isinstance(stored, float) and isinstance(again, float):
        return math.isclose(stored, again, rel_tol=1e-9, abs_tol=1e-12)
    return bool(stored == again)


@in_one_sentence("harness.verify")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; exit status 1 where the study has a problem."""
    parser = argparse.ArgumentParser(
        prog="python -m harness.verify",
        description="Check a study: missing, changed and foreign files; outdated scores and verdict.",
        epilog="Example: python -m harness.verify results/my-study",
    )
    parser.add_argument("study", type=Path, help="a folder under results/ that harness.sweep wrote")
    study = parser.parse_args(argv).study
    try:
        problems = verify_study(study)
    except UsageError as error:
        print(f"harness.verify: {error}", file=sys.stderr)
        return 2
    for problem in problems:
        print(problem)
    print(f"{study}: {plural(len(problems), 'problem') if problems else _ALL_RIGHT}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
