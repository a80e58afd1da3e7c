"""The decision of a study: study.yaml and scores.csv -> verdict.json, and a line in the looks log.

Also the problems of the section `decide` of a config.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from harness.config.arms import BASE, title
from harness.config.keys import shown
from harness.config.schema import GUARD, RunConfig
from harness.decide.beside import length_caveats_of
from harness.decide.copies import ANSWERS
from harness.decide.looks import DecidingRuns, deciding_runs, log_look
from harness.decide.notes import add_notes, without_bad_scorers
from harness.decide.policies import policies
from harness.decide.recommend import recommend
from harness.decide.rule import verdict
from harness.decide.scores_file import as_names, read_scores
from harness.decide.version_1 import version_1_warning
from harness.study.decision import VERDICT_FILE, Verdict, edge_warnings, golden_problem
from harness.study.errors import UsageError
from harness.study.files import FileCache, write_json
from harness.study.manifest import data_identity, read_manifest
from harness.study.registration import Registration, contrast_of, facts_warnings, read_study


class Decision(NamedTuple):
    """A verdict with its basis: the registration, and the runs that decided."""

    verdict: Verdict
    registered: Registration
    runs: DecidingRuns


def decide_study(study: Path, files: FileCache | None = None) -> Verdict:
    """Decide a study by its registered rule, log the look at golden, and write verdict.json.

    Raises:
        UsageError: the folder holds no scored study, or its scores cannot be decided on.
    """
    result, registered, runs = decision(study, files)
    earlier = log_look(study, result["arms"], runs, registered.get("configs", {}))
    result["warnings"] = [*earlier, *result["warnings"]]
    result["caveats"] = [*earlier, *result["caveats"]]
    write_json(study / VERDICT_FILE, result)
    return result


def decision(study: Path, files: FileCache | None = None) -> Decision:
    """Apply a study's registered rule to its scores; write nothing.

    Raises:
        UsageError: the folder holds no scored study, or its scores cannot be decided on.
    """
    path = study / "study.yaml"
    if not path.is_file() or not (study / "scores.csv").is_file():
        raise UsageError(
            f"{study}: no scored study (study.yaml and scores.csv); give a folder that harness.sweep wrote"
        )
    registered = read_study(path)
    arms = registered.get("contrast") or contrast_of(registered["arms"])
    if len(arms) < 2:
        raise UsageError(f"{study}: only the arm {', '.join(registered['arms'])}; a decision needs two")
    metric, seeds = registered["metric"], registered.get("seeds", {})
    needed = [metric, *(guard["metric"] for guard in registered.get("guards") or ())]
    scores, left_out = without_bad_scorers(read_scores(study / "scores.csv"), needed)
    _refuse_foreign(study, scores, arms, seeds)
    try:
        runs = deciding_runs(scores, metric=metric, arms=arms, seeds=seeds, looks=registered.get("looks") or [])
    except UsageError as error:
        raise UsageError(f"{study}: {error}") from error
    margin, alpha = registered["margin"], registered["alpha"] / max(1, len(runs.looks))
    guards = registered.get("guards") or ()
    result = verdict(
        _with_answers(study, runs.scores, files),
        metric=metric,
        margin=margin,
        alpha=alpha,
        arms=(arms[0], arms[1]),
        guards=guards,
        others=registered["arms"],
    )
    if "rule_version" not in registered:
        result["warnings"].append(
            version_1_warning(
                runs.scores, metric=metric, margin=margin, alpha=alpha, arms=(arms[0], arms[1]), guards=guards
            )
        )
    if runs.looks:
        reached = len(runs.seeds[arms[0]])
        result["look"] = {"seeds": reached, "registered": runs.looks, "alpha": registered["alpha"]}
    identity = data_identity(study, files)
    if identity["status"] == "not proved":
        result["warnings"].append(f"identical data is NOT proved: {'; '.join(identity['reasons'])}")
    base = scores[(scores["arm"] == BASE) & (scores["split"] == "golden") & (scores["scorer"] == metric)]
    if len(base):
        result["base_mean"] = float(base["score"].mean())
    add_notes(runs.scores, result)
    result["caveats"] += length_caveats_of(runs.scores, result)
    _add_policies(study, result, files)
    result["recommendation"] = recommend(result)
    result["warnings"] += left_out
    result["warnings"] += [
        *_plan_warnings(registered, result, runs),
        *registered.get("warnings", []),
        *facts_warnings(study),
    ]
    return Decision(result, registered, runs)


def _add_policies(study: Path, result: Verdict, files: FileCache | None) -> None:
    """Add what the answers say: which policies are the base's, and which babble to the limit and are below it."""
    found = policies(study, result["configs"], result["run_means"], files)
    if found.same_as_base:
        result["same_as_base"] = found.same_as_base
    for arm, against in result["against_base"].items():
        if found.at_the_limit.get(arm, 0.0) >= 0.5 and against["ci95"][1] < 0:
            against["collapsed"] = True


def _with_answers(study: Path, scores: pd.DataFrame, files: FileCache | None) -> pd.DataFrame:
    """Return the scores with the hash of each run's answers, as the trials' manifests have it, to find copies by."""
    hashes = {}
    for path in sorted(study.glob("trials/*/manifest.json")):
        run = read_manifest(path.parent, files)
        record = run.get("files", {}).get("completions.jsonl")
        if record and not run.get("flags"):  # what has collapsed may well answer alike
            hashes[run["arm"], run["config"], str(run["seed"])] = record["sha256"]
    runs = zip(scores["arm"], scores["config"], as_names(scores["seed"]), strict=True)
    return scores.assign(**{ANSWERS: [hashes.get(run, "") for run in runs]})


def _refuse_foreign(study: Path, scores: pd.DataFrame, arms: Sequence[str], seeds: Mapping[str, Sequence[int]]) -> None:
    """Refuse golden scores of unregistered or unselected runs, and of runs that selected: they must not decide."""
    golden = scores[(scores["split"] == "golden") & scores["arm"].isin(list(arms))]
    runs = golden[["arm", "config", "seed"]].drop_duplicates().itertuples(index=False, name=None)
    for arm, config, seed in runs:
        number = int(seed) if str(seed).isdigit() else -1
        problem = golden_problem(study, str(arm), str(config), number)
        if not problem and arm in seeds and number not in seeds[arm]:
            problem = f"{arm} {config} seed {seed} is on golden and was not registered; take its trial's folder away"
        if problem:
            raise UsageError(f"{study / 'scores.csv'}: {problem}")


def _plan_warnings(registered: Registration, result: Verdict, runs: DecidingRuns) -> list[str]:
    """Warn of registered seeds without scores, of unequal budgets, and of a selected config on the edge of its grid."""
    warnings = []
    for arm in result["arms"]:
        scored = set(runs.scores[(runs.scores["arm"] == arm) & (runs.scores["split"] == "golden")]["seed"])
        missing = [seed for seed in runs.seeds[arm] if str(seed) not in map(str, scored)]
        if missing:
            shown = ", ".join(map(str, missing))
            warnings.append(
                f"{arm}: registered seed {shown} has no scores (failed or unfinished); finish the study first"
            )
    configs = {arm: registered.get("configs", {}).get(arm, []) for arm in result["arms"]}
    if len({len(found) for found in configs.values()}) > 1:
        shown = ", ".join(f"{arm} {len(found)}" for arm, found in configs.items())
        warnings.append(f"unequal budgets ({shown} configs): the best of many beats the best of few by luck alone")
    for arm, found in configs.items():
        warnings += [f"{title(arm)}: {text}" for text in edge_warnings(found, result["configs"][arm])]
    return warnings


def problems(config: RunConfig) -> Iterator[str]:
    """Yield what is wrong with the form of the guards; `harness.score.scorers` checks their metrics."""
    metrics = []
    for guard in config.decide.guards:
        metric, margin = guard.get("metric"), guard.get("margin")
        if set(guard) != {"metric", "margin"} or not isinstance(margin, int | float) or not 0 < margin < 1:
            yield f"decide.guards: {shown(guard)}: each guard is {GUARD}"
        elif metric in metrics:
            yield f"decide.guards: {metric} is guarded twice; give it once"
        metrics.append(metric)
