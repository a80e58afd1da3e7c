"""Scorers that look at a whole study: judge, reward model, length control, benchmarks, and files of your own.

Input: stored answers -> output: rows in each run's scores.jsonl. Trains nothing and generates nothing; what was asked,
computed or run before is not again. A scorer that leaves more than 1% of a run's prompts unscored has failed, by name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness.config.checkpoint import checkpoint_dir
from harness.config.schema import ScoreConfig
from harness.score.answers import Preference, Run, Stored, read_stored, write_preferences
from harness.score.available import BENCHMARKS, COMPARING, Scoring, run_names, score_problems
from harness.score.exchange import read_outputs
from harness.score.length_control import control_runs
from harness.score.lm_eval import PREFIX, run_benchmarks
from harness.score.reward_model import reward_runs
from harness.score.scorers import SCORERS, Score, is_file, load_scorer, scorer_name
from harness.score.settings import NOTE, Settings, read_settings
from harness.score.trial_scores import collect_scores, outputs_of, replace_scores, score_trial, trial_folders
from harness.study.errors import UsageError
from harness.study.files import locked, read_jsonl, write_json
from harness.study.integrity import done_stages
from harness.study.manifest import load_manifest
from harness.study.registration import Registration, read_study
from harness.study.scores_csv import MAX_UNSCORED


def _judge_runs(stored: Stored, config: ScoreConfig, cache: Path) -> dict[Path, list[Preference]]:
    from harness.score.judge import judge_runs  # its client is an extra

    return judge_runs(stored, config, cache)


# In the order in which they need each other.
_COMPARE: dict[str, Callable[[Stored, ScoreConfig, Path], dict[Path, list[Preference]]]] = {
    "judge": _judge_runs,
    "reward_model": reward_runs,
    "length_controlled": control_runs,
}

_ORDER = list(_COMPARE)


def score_study(study: Path, scoring: Scoring) -> list[str]:
    """Score a study's runs, and return what failed: a sentence for each scorer that left too much unscored.

    Raises:
        UsageError: where the baseline cannot be read or lacks answers.
    """
    folders = [folder for folder in trial_folders(study) if _may_score(folder)]
    prompts = list(read_jsonl(study / "prompts.jsonl"))
    baseline = scoring.config.baseline
    given = read_outputs(baseline, prompts, key="score.baseline") if baseline else {}
    stored = read_stored(study, folders, scoring.splits, given)
    problems = []
    for name in sorted(scoring.names, key=lambda name: _ORDER.index(name) if name in _ORDER else len(_ORDER)):
        try:
            problems += _score_with(name, stored, scoring)
        except UsageError as error:  # the other scorers go on
            problems.append(f"{scorer_name(name)}: {error}")
    return problems


def _score_with(name: str, stored: Stored, scoring: Scoring) -> list[str]:
    if name == BENCHMARKS:
        return _benchmarks(stored, scoring)
    if is_file(name):
        scorer, prompts = load_scorer(name), list(read_jsonl(stored.study / "prompts.jsonl"))
        scores = {run.folder: scorer(outputs_of(run.folder, prompts)) for run in stored.runs}
        return _store(stored, scorer_name(name), scores)
    found = _COMPARE[name](stored, scoring.config, scoring.cache)
    for folder, preferences in found.items():
        write_preferences(folder, name, preferences, stored.splits)
    return _store(stored, name, {folder: [_score(one) for one in ones] for folder, ones in found.items()})


def blocking(problems: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return the problems of scorers that these metrics need."""
    return [problem for problem in problems if any(_concerns(problem, name) for name in names)]


def _concerns(problem: str, name: str) -> bool:
    return problem.startswith((f"{name}: ", f"{name.partition(':')[0]}: "))


def _may_score(folder: Path) -> bool:
    """Leave out trials that still run."""
    return load_manifest(folder)["status"] != "running"


def _score(one: Preference) -> Score:
    return Score(one.split, one.prompt_id, one.preference, one.reason)


def _benchmarks(stored: Stored, scoring: Scoring) -> list[str]:
    """Run the benchmarks on the base and on the runs that have answered golden."""
    confirmed = [run for run in stored.runs if any(split == "golden" for split, _ in run.answers) or run.failed]
    of_golden = replace(stored, splits=("golden",), runs=tuple(confirmed))
    found = run_benchmarks(of_golden, scoring.config.lm_eval, scoring.model)
    problems = []
    for task in scoring.config.lm_eval.tasks:
        names = {name for scores in found.values() for name in scores if name.startswith(f"{PREFIX}{task}")}
        for name in sorted(names):
            problems += _store(of_golden, name, {folder: scores.get(name, []) for folder, scores in found.items()})
    return problems


def _store(stored: Stored, name: str, found: Mapping[Path, Sequence[Score]]) -> list[str]:
    """Write a scorer's rows into each run's scores; a run that scores as worst gets 0 wherever another has a score."""
    keys = list(dict.fromkeys((one.split, one.prompt_id) for scores in found.values() for one in scores))
    problems = []
    for run in stored.runs:
        scores = [Score(*key, 0.0) for key in _keys(run, keys)] if run.failed else list(found.get(run.folder, []))
        replace_scores(run.folder, name, scores, stored.prompts, stored.splits)
        problems += _problem(run, name, scores)
    return problems


def _keys(run: Run, keys: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    return [key for key in keys if key[0] in run.manifest["done"]]


def _problem(run: Run, name: str, scores: Sequence[Score]) -> list[str]:
    reasons = Counter(one.unscored_reason for one in scores if one.score is None)
    lost = sum(reasons.values())
    if lost <= MAX_UNSCORED * len(scores):
        return []
    about = f"{run.manifest['arm']} seed {run.manifest['seed']}"
    most = "; ".join(f"{reason} ({count})" for reason, count in reasons.most_common(2))
    return [
        f"{name}: {lost} of {len(scores)} prompts of {about} have no score ({lost / len(scores):.1%}, allowed "
        f"{MAX_UNSCORED:.0%}): {most}; the same command again asks for these alone"
    ]


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


def _refuse_change(registered: Registration, config: ScoreConfig, names: Sequence[str]) -> None:
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


def _score_trials(study: Path, names: Sequence[str], registered: Registration) -> None:
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
