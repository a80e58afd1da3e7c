"""The study as a whole: base -> train and answer dev -> select on dev -> answer golden -> decide -> report.

Knows nothing of Hydra: trials are launched through a function that the sweep passes in. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness.config import RunConfig, config_label
from harness.records import UsageError, read_json
from harness.registration import read_study
from harness.score import collect_scores
from harness.tracking import track
from harness.trial import Outcome, is_complete, study_dir, trial_dir

Launch = Callable[[Sequence[RunConfig]], list[Outcome]]


@dataclass(frozen=True)
class StudyResult:
    """What a sweep ends with.

    Attributes:
        outcomes: of all trials, those finished earlier included.
        verdict: as in verdict.json; None where there is nothing to decide.
        undecided: why there is no verdict: one arm, or an arm of which no trial is complete.
        report: path of report.html.
        launched: number of trials that this call ran.
    """

    outcomes: list[Outcome]
    verdict: dict[str, Any] | None
    undecided: str
    report: Path
    launched: int


def run_study(base: RunConfig, trials: Sequence[RunConfig], launch: Launch) -> StudyResult:
    """Run what is missing of a study, then decide and report.

    Args:
        base: the SFT base as a trial of its own, which the others need.
        trials: all configs and seeds of all arms.
        launch: runs trials and returns how they ended.
    """
    study = study_dir(base)
    outcomes, launched = _finish([base], launch)
    if outcomes[0].status == "failed":
        return StudyResult(outcomes, None, "the SFT base could not be scored", study / "report.html", launched)
    several = {arm for arm, configs in _configs_by_arm(trials).items() if len(configs) > 1}
    first = [replace(trial, evaluate=["dev"]) if trial.method.name in several else trial for trial in trials]
    trained, new = _finish(first, launch)
    launched += new
    if several:
        selected = select_configs(study, several)
        chosen = [trial for trial in trials if config_label(trial) == selected.get(trial.method.name)]
        answered, new = _finish(chosen, launch)
        launched += new
        by_id = {outcome.trial_id: outcome for outcome in answered}
        trained = [by_id.get(outcome.trial_id, outcome) for outcome in trained]
    collect_scores(study)
    verdict, undecided = _decide(study)
    report = _report(study)
    if launched and verdict:
        _mirror(base, study, verdict)
    return StudyResult([*outcomes, *trained], verdict, undecided, report, launched)


def _configs_by_arm(trials: Sequence[RunConfig]) -> dict[str, set[str]]:
    configs: dict[str, set[str]] = {}
    for trial in trials:
        configs.setdefault(trial.method.name, set()).add(config_label(trial))
    return configs


def _finish(trials: Sequence[RunConfig], launch: Launch) -> tuple[list[Outcome], int]:
    """Launch the trials that are not complete; return how all of them ended, and how many were launched."""
    missing = [trial for trial in trials if not is_complete(trial, tuple(trial.evaluate))]
    by_id = {outcome.trial_id: outcome for outcome in launch(missing)} if missing else {}
    outcomes = []
    for trial in trials:
        manifest = trial_dir(trial) / "manifest.json"
        facts = read_json(manifest) if manifest.is_file() else {}
        known = by_id.get(facts.get("trial_id", ""))
        outcomes.append(known or _finished(trial, facts))
    return outcomes, len(missing)


def _finished(trial: RunConfig, facts: dict[str, Any]) -> Outcome:
    status = facts.get("status", "failed")
    message = "" if status == "complete" else facts.get("divergence", "it left no manifest")
    return Outcome(facts.get("trial_id", ""), trial.method.name, config_label(trial), trial.seed, status, message)


def select_configs(study: Path, arms: set[str]) -> dict[str, str]:
    """Return each arm's config with the best mean dev score over its seeds; golden is not looked at."""
    import pandas as pd

    metric = read_study(study / "study.yaml")["metric"]
    scores = pd.read_csv(collect_scores(study), keep_default_na=False)
    dev = scores[(scores["split"] == "dev") & (scores["scorer"] == metric) & scores["arm"].isin(arms)]
    means = pd.to_numeric(dev["score"]).groupby([dev["arm"], dev["config"]]).mean()
    lacking = sorted(arms - set(means.index.get_level_values(0)))
    if lacking:
        raise UsageError(
            f"{study}: {', '.join(lacking)} has several configs and dev has no scores of {metric} to select on; "
            "give dev rows with the same kind of scores as golden (checks, or chosen and rejected)"
        )
    return {arm: str(means.loc[arm].idxmax()) for arm in sorted(arms)}


def _decide(study: Path) -> tuple[dict[str, Any] | None, str]:
    """Return the verdict, or None with the reason; a verdict on what the scores no longer say is taken away."""
    from harness.decide import decide_study

    try:
        return decide_study(study), ""
    except UsageError as error:
        (study / "verdict.json").unlink(missing_ok=True)
        return None, str(error)


def _mirror(base: RunConfig, study: Path, verdict: dict[str, Any]) -> None:
    """Log the study itself: the verdict as a summary, the figures and the report as pages."""
    with track(
        base.tracking,
        folder=study,
        name=f"{study.name}-verdict",
        group=study.name,
        job_type="study",
        tags=["study", verdict["verdict"], verdict["level"]],
        config=read_study(study / "study.yaml"),
    ) as tracker:
        tracker.summarise({f"verdict/{key}": value for key, value in verdict.items()})
        for figure in sorted((study / "figures").glob("*.svg")):
            tracker.page(f"figures/{figure.stem}", figure)
        tracker.page("report", study / "report.html")


def _report(study: Path) -> Path:
    from harness.report import render_report

    return render_report(study)
