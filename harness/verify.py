"""What of a study can be trusted: files against their hashes, scores against answers, verdict against scores.

Command: `python -m harness.verify results/STUDY`. Changes nothing. Imports no torch.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import pandas as pd

from harness.config.trial_id import stored_trial_id
from harness.decide.study import decision
from harness.report.words import plural
from harness.score.exchange import GIVEN
from harness.score.trial_scores import scores_again
from harness.study.backup import NAMES, is_twin
from harness.study.errors import UsageError, in_one_sentence
from harness.study.files import Reader, file_sha256
from harness.study.identity import data_identity
from harness.study.integrity import WEIGHTS, is_outdated, leads_out
from harness.study.manifest import has_hash, is_as_written, read_manifest
from harness.study.registration import read_study
from harness.study.scores_csv import original, read_csv, to_csv
from harness.study.text import one_line

_TRIAL_FILES = {
    "config.yaml", "manifest.json", "train.jsonl", "completions.jsonl", "pairs.jsonl", "scores.jsonl", "failure.json",
    "earlier_failure.json", "preferences.jsonl", "benchmarks.jsonl", "live.jsonl", "log.txt", ".lock",
}  # fmt: skip
_TRIAL_FOLDERS = {*WEIGHTS, "checkpoints", ".twins"}
_STUDY_FILES = {
    "study.yaml", "prompts.jsonl", "scores.csv", "verdict.json", "report.html", "report.md", "ledger.jsonl",
    "selection.json", "micro_batch.json", "scoring.json", "judge.json", "length_controlled.json", ".lock",
}  # fmt: skip
_STUDY_FOLDERS = {"base", "trials", "costs", "figures", "wandb", "exports", ".twins", ".submitit"}
_ALL_RIGHT = (
    "all as the sweep left it (hashes, ids, scores, verdict; the report's pages and W&B's files are not checked)"
)
_FINISHED = ("complete", "diverged")


def verify_study(study: Path) -> list[str]:
    """Return what cannot be trusted, a sentence each; empty where everything is as the sweep left it.

    Raises:
        UsageError: the folder is not a study.
    """
    if not (study / "study.yaml").is_file():
        raise UsageError(f"{study}: no study.yaml; give a folder that harness.sweep wrote")
    try:
        registered = read_study(study / "study.yaml")
    except UsageError as error:
        return [str(error)]
    problems = list(_foreign(study, _STUDY_FILES, _STUDY_FOLDERS))
    problems += [
        f"trials/{path.name} is foreign: no stage writes it" for path in study.glob("trials/*") if path.is_file()
    ]
    problems += [f"{name} is not what its second copy says" for name in NAMES if not is_twin(study / name)]
    folders = [path for path in [study / "base", *sorted((study / "trials").glob("*"))] if path.is_dir()]
    for folder in [*folders, *sorted(path for path in study.glob("costs/*") if path.is_dir())]:
        problems += [f"{folder.relative_to(study)}: {problem}" for problem in _trial(study, folder, registered)]
    problems += _runs(study, registered)
    if registered.get("model", {}).get("path") != GIVEN:
        problems += [f"identical data: {reason}" for reason in data_identity(study)["reasons"]]
    return [*problems, *_scores(study, folders), *_verdict(study)]


def _trial(study: Path, folder: Path, registered: Mapping[str, Any]) -> Iterator[str]:
    reader = Reader(study)
    manifest = reader.mapping(folder / "manifest.json")
    yield from reader.problems
    if not manifest:
        yield "foreign or unfinished: it has no manifest; the sweep's command finishes it, if it is one of its trials"
        return
    if not is_as_written(manifest):
        yield "manifest.json was changed: what it says is not believed, and its files are not checked"
        return
    if not has_hash(manifest):
        yield "manifest.json holds no hash of itself (an older version wrote it, or somebody took it out)"
    if folder.parent.name == "trials" and folder.name != manifest.get("trial_id"):
        yield f"the folder was renamed: its manifest is of trial {manifest.get('trial_id')}"
    if manifest.get("base_sha256") != (base := registered.get("model", {}).get("base_sha256")):
        found = manifest.get("base_sha256")
        yield f"it started from another base ({_short(found)}) than the registered one ({_short(base)})"
    if manifest.get("status") not in _FINISHED:
        yield f"it is {manifest.get('status')}: run the sweep's command again"
    if is_outdated(study, manifest.get("seed"), size := manifest.get("micro_batch_size")):
        yield f"it was trained with a micro-batch of {size}, and another trial of its seed with a smaller one"
    yield from _config(reader.mapping(folder / "config.yaml"), manifest, registered)
    yield from _files(folder, manifest)


def _runs(study: Path, registered: Mapping[str, Any]) -> Iterator[str]:
    """Compare which runs there are with those that study.yaml registered."""
    configs, seeds = registered.get("configs", {}), registered.get("seeds", {})
    tuning = registered.get("tuning_seeds", [])
    found = set()
    for folder in sorted(path for path in (study / "trials").glob("*") if path.is_dir()):
        run = read_manifest(folder)
        arm, config, seed = run.get("arm"), run.get("config"), run.get("seed")
        found.add((arm, seed))
        if run and (config not in configs.get(arm, []) or seed not in [*seeds.get(arm, []), *tuning]):
            yield f"trials/{folder.name}: {arm} {config} seed {seed} is foreign: study.yaml did not register it"
    looks = registered.get("looks") or []
    for arm, registered_seeds in seeds.items():
        begun = registered_seeds[: min(looks, default=len(registered_seeds))]
        missing = [str(seed) for seed in begun if (arm, seed) not in found]
        if missing and (study / "verdict.json").is_file():
            yield f"{arm}: there is no trial of the registered seed {', '.join(missing)}"


def _config(config: Mapping[str, Any], manifest: Mapping[str, Any], registered: Mapping[str, Any]) -> Iterator[str]:
    """Compare a trial's id with what its config and the registered files give; adopted answers have no config."""
    if not config:
        return
    try:
        found = stored_trial_id(config, registered["fixed"]["contents"])
    except (KeyError, AttributeError, TypeError) as error:
        yield f"config.yaml is no config of a trial ({type(error).__name__}: {error})"
        return
    if found != manifest.get("trial_id"):
        yield f"config.yaml and the study's data give trial {found}, the manifest {manifest.get('trial_id')}"


def _files(folder: Path, manifest: Mapping[str, Any]) -> Iterator[str]:
    known = manifest.get("files", {})
    if not known and manifest.get("status") in _FINISHED:
        yield "no hashes are recorded (an older version wrote it): its files cannot be checked"
    for name, file in known.items():
        path = folder / name
        if leads_out(name):
            yield f"manifest.json names {one_line(name, 200)}, which is not in the folder: it is not read"
        elif not path.is_file():
            yield f"{name} is missing"
        elif file_sha256(path) != file["sha256"]:
            yield f"{name} was changed"
    yield from _foreign(folder, _TRIAL_FILES, _TRIAL_FOLDERS)
    weights = [path for name in WEIGHTS for path in (folder / name).rglob("*") if path.is_file()]
    for path in weights if known else ():
        if (name := path.relative_to(folder).as_posix()) not in known:
            yield f"{name} is foreign: no stage writes it"


def _foreign(folder: Path, files: Set[str], folders: Set[str]) -> Iterator[str]:
    for path in sorted(folder.iterdir()):
        if path.name not in (folders if path.is_dir() else files):
            yield f"{path.name} is foreign: no stage writes it"


def _scores(study: Path, folders: Sequence[Path]) -> Iterator[str]:
    """Compare the scores of checks with what the answers give now, and scores.csv with the trials' scores."""
    reader = Reader(study)
    prompts = reader.rows(study / "prompts.jsonl")
    stored: list[dict[str, Any]] = []
    for folder in folders:
        rows = reader.rows(folder / "scores.jsonl")
        stored += rows
        try:
            again = scores_again(folder, prompts, study / "base")
        except (OSError, ValueError, KeyError, TypeError, UsageError) as error:
            yield f"{folder.relative_to(study)}: its answers cannot be scored again ({type(error).__name__}: {error})"
            continue
        now = {_key(row): row["score"] for row in rows}
        stale = sum(now.get(key, "absent") != score for key, score in again.items())
        if rows and stale:
            yield f"{folder.relative_to(study)}: {stale} of {len(again)} scores are not those of its answers: stale"
    yield from reader.problems
    yield from _table(study, stored)


def _table(study: Path, stored: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    path = study / "scores.csv"
    if not path.is_file():
        yield from ["scores.csv is missing"] if stored else []
        return
    try:
        found = read_csv(path)
    except ValueError as error:
        yield f"scores.csv: {error}"
        return
    expected = pd.DataFrame(list(stored)).reindex(columns=found.columns)
    lines = [[original(cell) for cell in line] for line in _cells(to_csv(expected))]
    if lines != found.astype(str).to_numpy().tolist():
        yield "scores.csv is not what the trials' scores.jsonl say: stale, or changed"


def _cells(text: str) -> list[list[str]]:
    return list(csv.reader(io.StringIO(text, newline="")))[1:]


def _verdict(study: Path) -> Iterator[str]:
    """Decide again in memory and compare."""
    reader = Reader(study)
    stored = reader.mapping(study / "verdict.json")
    yield from reader.problems
    if not stored:
        return
    try:
        again = decision(study)[0]
    except UsageError as error:
        yield f"verdict.json: the scores cannot be decided on now: {error}"
        return
    again = json.loads(json.dumps(again))
    warned = stored.pop("warnings", None) or ()  # with what the ledger adds, which a second look would change
    lacking = [text for text in again.pop("warnings") if text not in warned]
    if lacking:
        yield f"verdict.json: lacks the warning {_shown(lacking[0])}: stale, or changed"
    for key in dict.fromkeys([*again, *stored]):
        was, now = _shown(stored.get(key)), _shown(again.get(key))
        if stored.get(key) != again.get(key):
            yield f"verdict.json: {key} is {was}, and the scores give {now}: stale, or changed"


def _shown(value: Any) -> str:
    return one_line(str(value), 200)


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["split"], row["prompt_id"], row["scorer"]


def _short(sha256: Any) -> str:
    return str(sha256)[:12]


@in_one_sentence("harness.verify")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; exit status 1 where something cannot be trusted."""
    parser = argparse.ArgumentParser(
        prog="python -m harness.verify",
        description="Say what of a study cannot be trusted: missing, changed, foreign files; stale scores and verdict.",
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
