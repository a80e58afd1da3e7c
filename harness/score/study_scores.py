"""Score a whole study: scorers that compare its answers, benchmarks, and Python files of the user.

Input: stored answers -> rows in each run's scores.jsonl. Trains nothing and generates nothing; cached results are used
again. A scorer that leaves more than 1% of a run's prompts unscored has failed, and is named.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from harness.config.checkpoint import Checkpoints
from harness.config.schema import ModelConfig, RunConfig, Tuning
from harness.data.reasoning import KEEP, part
from harness.score.answers import Base, Run, Score, Scoring, Stored, read_outputs, read_stored
from harness.score.own_scorers import note_failures
from harness.score.scorers import (
    SCORERS,
    TRIAL_SCORERS,
    Needs,
    find_scorer,
    in_order,
    is_file,
    reads,
    run_names,
    score_problems,
    scorer_name,
    titles,
    with_sources,
)
from harness.score.settings import NOTE, Settings, read_settings
from harness.score.trial_scores import collect_scores, replace_scores, score_trial, trial_folders
from harness.study.errors import UsageError
from harness.study.files import locked, read_jsonl, write_json
from harness.study.integrity import done_stages
from harness.study.manifest import load_manifest
from harness.study.registration import Registration, read_study
from harness.study.scores_csv import MAX_UNSCORED
from harness.train.derived import derive


def scoring_of(config: RunConfig, splits: Sequence[str], names: Sequence[str] = ()) -> Scoring | None:
    """Return the scoring of a study in a sweep; None where its config sets up no scorer of the whole study.

    Args:
        config: of any trial of the study.
        splits: the splits to score.
        names: the scorers to run; empty for all configured ones.
    """
    found = with_sources(config.score, run_names(config.score, names))
    if not found:
        return None
    is_quantised = config.train.tuning is Tuning.qlora
    base = _base(config.model, config.results_dir, is_quantised=is_quantised) if reads(found, "model") else None
    return Scoring(config.score, found, splits, Path(config.results_dir) / ".cache", base)


def _base(model: ModelConfig, results_dir: str, *, is_quantised: bool) -> Base:
    return Base(Checkpoints(derive).folder(model, results_dir), model.chat_template, is_quantised)


def score_study(study: Path, scoring: Scoring) -> list[str]:
    """Score a study's runs.

    Returns:
        The problems: one sentence per scorer that failed or left too much of a run unscored.

    Raises:
        UsageError: where the baseline cannot be read or lacks answers.
    """
    folders = [folder for folder in trial_folders(study) if load_manifest(folder)["status"] != "running"]
    prompts = list(read_jsonl(study / "prompts.jsonl"))
    baseline = scoring.config.baseline
    given = read_outputs(baseline, prompts, key="score.baseline") if baseline else {}
    if not _keeps_reasoning(study):
        given = {name: part(answer).answer for name, answer in given.items()}
    stored = read_stored(study, folders, scoring.splits, given)
    problems = []
    failed: dict[str, str] = {}
    for name in in_order(scoring.names):
        try:
            problems += _score_with(name, stored, scoring)
        except UsageError as error:  # the other scorers go on
            problems.append(f"{scorer_name(name)}: {error}")
            failed |= {scorer_name(name): str(error)} if is_file(name) else {}
    note_failures(study, [scorer_name(name) for name in scoring.names if is_file(name)], failed)
    return problems


def _keeps_reasoning(study: Path) -> bool:
    """Return whether the study scores the reasoning in its answers, and so in those of its baseline."""
    fixed = read_study(study / "study.yaml").get("fixed", {})
    return (fixed.get("generate") or {}).get("reasoning") == KEEP


def _score_with(name: str, stored: Stored, scoring: Scoring) -> list[str]:
    row = find_scorer(name)
    assert row is not None, "`run_names` returns scorers of the whole study"
    assert row.score_study is not None
    if row.needs is Needs.WEIGHTS:
        stored = _golden_only(stored)
    problems = []
    for score_name, scores in row.score_study(stored, scoring).items():
        problems += _store(stored, score_name, scores)
    return problems


def _golden_only(stored: Stored) -> Stored:
    """Keep the runs that have answered golden, and those that score as worst."""
    confirmed = [run for run in stored.runs if any(split == "golden" for split, _ in run.answers) or run.failed]
    return replace(stored, splits=("golden",), runs=tuple(confirmed))


def _store(stored: Stored, name: str, found: Mapping[Path, Sequence[Score]]) -> list[str]:
    """Write a scorer's rows into each run's scores and return its problems.

    A run that scores as worst gets 0 wherever another run has a score.
    """
    keys = list(dict.fromkeys((one.split, one.prompt_id) for scores in found.values() for one in scores))
    problems = []
    for run in stored.runs:
        worst = [Score(*key, 0.0) for key in keys if key[0] in run.manifest["done"]]
        scores = worst if run.failed else list(found.get(run.folder, []))
        replace_scores(run.folder, name, scores, stored.prompts, stored.splits)
        problems += _too_many_unscored(run, name, scores)
    return problems


def _too_many_unscored(run: Run, name: str, scores: Sequence[Score]) -> list[str]:
    reasons = Counter(one.unscored_reason for one in scores if one.score is None)
    lost = sum(reasons.values())
    if lost <= MAX_UNSCORED * len(scores):
        return []
    most = "; ".join(f"{reason} ({count})" for reason, count in reasons.most_common(2))
    return [
        f"{name}: {lost} of {len(scores)} prompts of {run.title} have no score ({lost / len(scores):.1%}, allowed "
        f"{MAX_UNSCORED:.0%}): {most}; the same command again asks for these alone"
    ]


def blocking(problems: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return the problems of the scorers of these metrics."""
    rows = [row.name for name in names if (row := find_scorer(name))]
    heads = tuple(f"{head}: " for name in [*names, *rows] for head in (name, name.partition(":")[0]))
    return [problem for problem in problems if problem.startswith(heads)]


def rescore(study: Path, scorers: Sequence[str], overrides: Sequence[str] = ()) -> tuple[Path, list[str]]:
    """Score the stored outputs of a study again.

    Args:
        study: its folder.
        scorers: names, or Python files; empty for all scorers of one trial.
        overrides: `score.KEY=VALUE` on top of the settings of the last scoring; `trust_study=true` to use addresses,
            variables and files that the study's folder names.

    Returns:
        The path of scores.csv, and the problems of `score_study`.

    Raises:
        UsageError: for a folder that is no study, a file in it that is damaged or lost, or wrong settings.
    """
    names = list(scorers) or list(TRIAL_SCORERS)
    _refuse_unknown(names)
    if not (study / "prompts.jsonl").is_file() or not (study / "study.yaml").is_file():
        raise UsageError(f"{study}: no scored study; give a folder under results/ that harness.sweep wrote")
    registered = read_study(study / "study.yaml")
    requested = [name for name in names if name not in TRIAL_SCORERS]
    settings = read_settings(study, overrides, requested)
    of_study = run_names(settings.score, requested) if requested else []
    problems = list(score_problems(settings.score, of_study)) or _other_settings(registered, settings, of_study)
    if problems:
        raise UsageError("\n".join(problems))
    with locked(study):
        _score_trials(study, [name for name in names if name in TRIAL_SCORERS], registered)
        failed = []
        if of_study:
            failed = score_study(study, _scoring_again(study, registered, settings, of_study))
            write_json(study / NOTE, {"settings": settings.noted})
        return collect_scores(study), failed


def _refuse_unknown(names: Sequence[str]) -> None:
    unknown = [name for name in names if name not in titles() and not is_file(name)]
    if unknown:
        raise UsageError(
            f"unknown scorer {', '.join(unknown)}; allowed: {', '.join(SCORERS)}, or a Python file of yours"
        )


def _other_settings(registered: Registration, settings: Settings, names: Sequence[str]) -> list[str]:
    """Refuse other settings than the registered ones for the scorers that decide."""
    fixed = registered.get("fixed", {}).get("score") or {}
    rows = [row for name in names if (row := find_scorer(name))]
    return [problem for row in rows if (problem := row.registered_problem(fixed, settings.score))]


def _scoring_again(study: Path, registered: Registration, settings: Settings, names: Sequence[str]) -> Scoring:
    is_tuned = registered.get("tuned") and any(row["split"] == "dev" for row in read_jsonl(study / "prompts.jsonl"))
    metric = registered["metric"]
    decides = metric in map(scorer_name, names) or bool({*run_names(settings.score, [metric])} & {*names})
    splits = ["dev", "golden"] if is_tuned and decides else ["golden"]
    base = (
        _base(settings.model, str(study.parent), is_quantised=settings.is_quantised) if reads(names, "model") else None
    )
    return Scoring(settings.score, names, splits, study.parent / ".cache", base)


def _score_trials(study: Path, names: Sequence[str], registered: Registration) -> None:
    """Check the files of all runs, and score the finished runs with the scorers of one trial."""
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
