"""The study as a whole: base -> train and answer dev -> select on dev -> answer golden -> decide -> report.

Knows nothing of Hydra: trials are launched through a function that the sweep passes in. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness.config import RunConfig, config_label
from harness.records import UsageError, locked, read_json
from harness.registration import read_study
from harness.score import collect_scores
from harness.selection import select_configs
from harness.tracking import track
from harness.trial import Outcome, is_complete, study_dir, trial_dir

Launch = Callable[[Sequence[RunConfig]], list[Outcome]]


@dataclass(frozen=True)
class StudyResult:
    """What a sweep ends with.

    Attributes:
        outcomes: of the SFT base and of all trials, those finished earlier included.
        verdict: as in verdict.json; None where there is nothing to decide.
        undecided: why there is no verdict.
        report: path of report.html; None where the base could not be scored, so that there is nothing to report.
        launched: number of trials that this call ran.
        is_comparison: True where several arms were asked for, so that a missing verdict is a failure.
    """

    outcomes: list[Outcome]
    verdict: dict[str, Any] | None
    undecided: str
    report: Path | None
    launched: int
    is_comparison: bool


def run_study(base: RunConfig, trials: Sequence[RunConfig], launch: Launch) -> StudyResult:
    """Run what is missing of a study, then decide and report.

    Args:
        base: the SFT base as a trial of its own, which the others need.
        trials: all configs and seeds of all arms.
        launch: runs trials and returns how they ended, in the same order.
    """
    study = study_dir(base)
    runs = _Runs(launch)
    runs.finish([base])
    is_comparison = len({trial.method.name for trial in trials}) > 1
    if runs.ended[_key(base)].status == "failed":
        outcomes = list(runs.ended.values())
        undecided = "the SFT base, which every arm is measured against, could not be scored"
        return StudyResult(outcomes, None, undecided, None, len(runs.launched), is_comparison)
    several = {arm for arm, configs in _configs_by_arm(trials).items() if len(configs) > 1}
    runs.finish([replace(trial, evaluate=["dev"]) if trial.method.name in several else trial for trial in trials])
    if several:
        with locked(study):
            scores = collect_scores(study)
        selected = select_configs(scores, read_study(study / "study.yaml")["metric"], several)
        runs.finish([trial for trial in trials if config_label(trial) == selected.get(trial.method.name)])
    with locked(study):
        collect_scores(study)
        verdict, undecided = _decide(study)
        report = _report(study)
    if runs.launched and verdict:
        _mirror(base, study, verdict)
    return StudyResult(list(runs.ended.values()), verdict, undecided, report, len(runs.launched), is_comparison)


def _configs_by_arm(trials: Sequence[RunConfig]) -> dict[str, set[str]]:
    configs: dict[str, set[str]] = {}
    for trial in trials:
        configs.setdefault(trial.method.name, set()).add(config_label(trial))
    return configs


def _key(trial: RunConfig) -> tuple[str, str, int]:
    return trial.method.name, config_label(trial), trial.seed


class _Runs:
    """How trials ended, and which of them were launched, over the several launches of a study."""

    def __init__(self, launch: Launch) -> None:
        self._launch = launch
        self.ended: dict[tuple[str, str, int], Outcome] = {}
        self.launched: set[tuple[str, str, int]] = set()

    def finish(self, trials: Sequence[RunConfig]) -> None:
        """Launch the trials that are not complete, and note how all of them ended."""
        missing = [trial for trial in trials if not is_complete(trial, tuple(trial.evaluate))]
        new = dict(zip(map(_key, missing), self._launch(missing), strict=True)) if missing else {}
        self.launched |= set(new)
        self.ended |= {_key(trial): new.get(_key(trial)) or _finished(trial) for trial in trials}


def _finished(trial: RunConfig) -> Outcome:
    """Read how a complete trial ended."""
    facts = read_json(trial_dir(trial) / "manifest.json")
    message = facts.get("divergence", "")
    return Outcome(facts["trial_id"], trial.method.name, config_label(trial), trial.seed, facts["status"], message)


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
