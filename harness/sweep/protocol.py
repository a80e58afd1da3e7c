"""The study as a whole: base -> tune on dev -> train what was selected with fresh seeds -> golden -> decide -> report.

Knows nothing of Hydra: trials are launched through a function that the sweep passes in. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.config.schema import RunConfig
from harness.decide.recommend import in_one_line
from harness.decide.study import decide_study
from harness.score.scorers import known_scorers
from harness.score.study_scores import blocking, score_study, scoring_of
from harness.score.trial_scores import collect_scores
from harness.study.decision import Verdict
from harness.study.errors import UsageError, is_outside, problem
from harness.study.files import FileCache, drop_temporaries, locked, locked_if_free
from harness.study.integrity import drop_damaged, is_outdated
from harness.study.manifest import read_manifest
from harness.study.outcome import Outcome, refusal, set_aside, standing_failure
from harness.study.registration import read_study
from harness.sweep.design import Design
from harness.sweep.trial import Context, Trial
from harness.sweep.tuning import tune
from harness.track.tracker import track

Launch = Callable[[Sequence[Trial]], list[Outcome]]


@dataclass(frozen=True)
class StudyResult:
    """What a sweep ends with.

    Attributes:
        outcomes: of the SFT base and of all trials, those finished earlier included.
        verdict: as in verdict.json; None where there is nothing to decide.
        undecided: why there is no verdict.
        report: path of report.html; None where the base could not be scored, so that there is nothing to report, and
            where it could not be written.
        launched: number of trials that this call ran.
        is_comparison: True where several arms were asked for, so that a missing verdict is a failure.
        stages: number of trials by stage: `base`, `tune`, `confirm`, `costs`.
        problems: scorers that failed, by name.
        unreported: why the report could not be written.
        expected: the verdict that the command expects; empty where it expects none.
    """

    outcomes: list[Outcome]
    verdict: Verdict | None
    undecided: str
    report: Path | None
    launched: int
    is_comparison: bool
    stages: Mapping[str, int]
    problems: list[str]
    unreported: str = ""
    expected: str = ""


def run_study(design: Design, launch: Launch, context: Context) -> StudyResult:
    """Run what is missing of a study, then decide and report.

    Args:
        design: what to train.
        launch: runs trials and returns how they ended, in the same order.
        context: state of this process.

    Raises:
        UsageError: where the SFT base is refused: no trial of the study can run.
    """
    study = design.study
    _drop_damaged(study, context.files)
    runs = _Runs(launch, design, study, context)
    verdict, undecided = None, ""
    if runs.finish("base", [design.base]):
        if why := refusal(design.base.folder):
            raise UsageError(why)
        undecided = "the SFT base, which every arm is measured against, could not be scored"
        return _result(runs, design, None, undecided)
    selected = tune(design, study, lambda trials: runs.finish("tune", trials), lambda: runs.failed)
    if selected is None and runs.problems:
        undecided = f"{'; '.join(runs.problems)}: no config is selected, and golden is not looked at"
    elif selected is None:
        undecided = (
            f"{runs.failed} of {runs.stages['tune']} tuning trials failed, so that no config is selected and golden is "
            "not looked at; mend the cause (failure.json) and run the same command, with retry_failed=true where the "
            "same error has come back"
        )
    else:
        for seeds in _looks(design):
            runs.finish("confirm", design.deciding(selected, seeds))
            blocked = runs.blocking()
            verdict, undecided = (None, blocked) if blocked else _decided(study, context.files)
            if verdict and verdict["verdict"] != "inconclusive":
                break
        runs.finish("costs", design.cost_trials(selected) if verdict else [])
    with locked(study):
        collect_scores(study, context.files)
        report, unreported = report_study(study, context.files)
    if runs.launched and verdict and report:
        _mirror(design.base_config, study, verdict, context)
    return _result(runs, design, verdict, undecided, report=report, unreported=unreported)


def _drop_damaged(study: Path, files: FileCache) -> None:
    """Delete what was damaged, or left half written, in trials that do not run; one that runs sees to itself.

    Scorers of the whole study write into finished trials, under the study's lock.
    """
    with locked(study):
        for folder in [study / "base", *study.glob("trials/*"), *study.glob("costs/*")]:
            if folder.is_dir():
                with locked_if_free(folder) as free:
                    if free:
                        drop_temporaries(folder)
                        drop_damaged(folder, read_manifest(folder, files), files)


def _looks(design: Design) -> list[Sequence[int]]:
    """Return the seeds that there are at each look at golden."""
    counts = design.any.decide.looks or [len(design.seeds)]
    return [design.seeds[:count] for count in counts]


def _result(
    runs: _Runs,
    design: Design,
    verdict: Verdict | None,
    undecided: str,
    *,
    report: Path | None = None,
    unreported: str = "",
) -> StudyResult:
    outcomes = list(runs.ended.values())
    found = (outcomes, verdict, undecided, report, len(runs.launched), len(design.arms) > 1, runs.stages)
    expected = design.any.expect or ""
    return StudyResult(*found, problems=runs.problems, unreported=unreported, expected=expected)


class _Runs:
    """How trials ended, and which of them were launched, over the several launches of a study."""

    def __init__(self, launch: Launch, design: Design, study: Path, context: Context) -> None:
        self._launch, self._bases = launch, context.bases
        self._design, self._study, self._files = design, study, context.files
        self.problems: list[str] = []
        self.ended: dict[Path, Outcome] = {}
        self.launched: set[Path] = set()
        self.stages: dict[str, int] = {}

    @property
    def failed(self) -> int:
        """Number of trials that failed, and one more where a scorer did."""
        return sum(outcome.status == "failed" for outcome in self.ended.values()) + bool(self.problems)

    def finish(self, stage: str, trials: Sequence[Trial]) -> int:
        """Launch the trials that are not complete, note how all of them ended, and return how many failed."""
        trials = list({trial.folder: trial for trial in trials}.values())
        missing = [trial for trial in trials if not trial.is_complete(self._files)]
        stand = {} if self._design.base_config.retry_failed else dict(_standing(missing))
        missing = [trial for trial in missing if trial.folder not in stand]
        for trial in missing:
            set_aside(trial.folder)
        new: dict[Path, Outcome] = {}
        while missing:
            new |= dict(zip([trial.folder for trial in missing], self._launch(missing), strict=True))
            now = {
                trial.folder: new.get(trial.folder) or trial.finished(self._files)
                for trial in trials
                if trial.folder not in stand
            }
            missing = [trial for trial in trials if _is_outdated(trial, now.get(trial.folder), self._files)]
        self.launched |= set(new)
        before = len(self.ended)
        new |= stand
        self.ended |= {trial.folder: new.get(trial.folder) or trial.finished(self._files) for trial in trials}
        self.stages[stage] = self.stages.get(stage, 0) + len(self.ended) - before
        if stage in ("tune", "confirm"):
            self._score(["dev"] if stage == "tune" else ["golden"])
        return sum(self.ended[trial.folder].status == "failed" for trial in trials)

    def _score(self, splits: Sequence[str]) -> None:
        """Let the scorers of the whole study score what is new; dev only by those that select on it."""
        registered = read_study(self._study / "study.yaml")
        names = [str(registered["metric"])] if splits == ["dev"] else []
        wanted = not names or names[0] in known_scorers(self._design.any.score)
        scoring = scoring_of(self._design.any, splits, names) if wanted else None
        if scoring is not None:
            self._bases.release()  # scorers load models of their own, some in other processes
            with locked(self._study):
                try:
                    self.problems = score_study(self._study, scoring)
                except UsageError as error:
                    self.problems = [f"{name}: {error}" for name in scoring.names]

    def blocking(self) -> str:
        """Say which scorers that the verdict needs have failed; empty where none has."""
        registered = read_study(self._study / "study.yaml")
        needed = [registered["metric"], *(guard["metric"] for guard in registered.get("guards") or ())]
        return "; ".join(blocking(self.problems, needed))


def _is_outdated(trial: Trial, outcome: Outcome | None, files: FileCache) -> bool:
    """Whether a trial that is finished has to train again, since another one of its seed has run out of memory."""
    if outcome is None or outcome.status != "complete" or trial.cost_name:
        return False
    return is_outdated(trial.study, trial.seed, read_manifest(trial.folder, files).get("micro_batch_size"))


def _standing(trials: Sequence[Trial]) -> Iterator[tuple[Path, Outcome]]:
    """Yield how trials failed that are not run again unless that is asked for."""
    for trial in trials:
        if why := standing_failure(trial.folder):
            yield trial.folder, trial.outcome("failed", why, retries=False)


def _decided(study: Path, files: FileCache) -> tuple[Verdict | None, str]:
    """Return the verdict, or None with the reason; a verdict on what the scores no longer say is taken away."""
    with locked(study):
        collect_scores(study, files)
        try:
            return decide_study(study, files), ""
        except UsageError as error:
            (study / "verdict.json").unlink(missing_ok=True)
            return None, str(error)


def _mirror(base: RunConfig, study: Path, verdict: Verdict, context: Context) -> None:
    """Log the study itself: the verdict as a summary, the figures and the report as pages."""
    from harness.report.prompts import answers_table  # loads matplotlib
    from harness.report.study import read_study as read_for_report

    with track(
        base.tracking,
        folder=study,
        name=f"{study.name}-verdict",
        group=study.name,
        job_type="study",
        tags=["study", verdict["verdict"], verdict["level"]],
        config=read_study(study / "study.yaml"),
        trackers=context.trackers,
    ) as tracker:
        summary = {f"verdict/{key}": value for key, value in verdict.items()}
        tracker.summarise({"recommendation": in_one_line(verdict["recommendation"], verdict["arms"]), **summary})
        tracker.table("side_by_side", *answers_table(read_for_report(study, context.files)))
        for figure in sorted((study / "figures").glob("*.svg")):
            tracker.page(f"figures/{figure.stem}", figure)
        tracker.page("report", study / "report.html")


def report_study(study: Path, files: FileCache | None = None) -> tuple[Path | None, str]:
    """Write the report; return its path, or None with the reason: a verdict is told where no page can be written."""
    from harness.report.page import render_report  # loads matplotlib

    try:
        return render_report(study, files), ""
    except Exception as error:
        if isinstance(error, UsageError) or not is_outside(error):
            raise
        return None, problem(error)
