"""The sweeper: plans a study's trials, checks them all before the first one starts, and launches them.

A Hydra plugin of the project's own: it expands an arm's keys for that arm only and runs the protocol through whatever
launcher is configured (`hydra/launcher=...`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.sweeper import Sweeper
from omegaconf import DictConfig

from harness.config.machine import job_problem, processes_problem, workers_here
from harness.config.schema import FamilyConfig, RunConfig
from harness.config.search import Params, configs_of, is_interval
from harness.config.trial_id import config_label
from harness.study.errors import UnreachableError, UsageError
from harness.study.log import say
from harness.study.outcome import Outcome, own_failure, standing_failure
from harness.study.text import one_line
from harness.sweep.estimate import print_plan, refuse_what_does_not_fit
from harness.sweep.problems import find_warnings
from harness.sweep.protocol import StudyResult, answer_trials, finished, report_study, run_study
from harness.sweep.registration import identify, is_complete, register, study_name, trial_dir
from harness.sweep.request import Composer, Design, Request, check_study, expand
from harness.sweep.terminal import show_progress

_WAITING = 4  # processes that wait for each core or GPU
_RELAUNCHES = 2


class PairedSweeper(Sweeper):
    """Plan all trials of a study, check them, and run the protocol through Hydra's launcher.

    Attributes:
        on_result: called with each study's result: Hydra's main function returns nothing in a multirun.
        typed: the arguments as the user typed them; Hydra gets others.
    """

    typed: ClassVar[tuple[str, ...]] = ()
    on_result: ClassVar[Callable[[StudyResult], None]] = staticmethod(lambda result: None)

    def setup(self, *, hydra_context: Any, task_function: Any, config: DictConfig) -> None:
        """Keep what is needed to compose and launch jobs."""
        self.config, self.composer = config, Composer(hydra_context.config_loader, config)
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )
        if type(self.launcher).__name__ == "SlurmLauncher":
            from harness.sweep.slurm_queue import watch_queue

            watch_queue()

    def sweep(self, arguments: list[str]) -> list[StudyResult]:
        """Run the study, or all studies of a family; or print their trials where `plan=true`."""
        request = expand(arguments, self.config)
        designs = list(self._designs(request))
        regrets = [list(dict.fromkeys(find_warnings_of(design))) for design in designs]
        if designs[0].base.plan:
            for design, warnings in zip(designs, regrets, strict=True):
                print_plan(design, warnings, self._at_once(design))
            return []
        for design in designs:
            self._refuse_what_cannot_run(design)
        for design, warnings in zip(designs, regrets, strict=True):
            register_design(design, ["harness.sweep", *type(self).typed], warnings)
        results = []
        for design in designs:
            results.append(run_study(design, self._launch))
            type(self).on_result(results[-1])
        if len(results) > 1:
            _report_again(results)
        return results

    def _refuse_what_cannot_run(self, design: Design) -> None:
        """Refuse what this machine has no room or no devices for, where trials run on this machine."""
        refuse_what_does_not_fit(design, self._at_once(design))
        is_elsewhere = type(self.launcher).__name__ in ("SlurmLauncher", "RayLauncher")
        problem = "" if is_elsewhere else processes_problem(design.any.accelerate)
        asked = getattr(self.launcher, "params", {}) or getattr(self.launcher, "resources", {})
        if problem := problem or job_problem(asked, design.any.accelerate):
            raise UsageError(problem)

    def _at_once(self, design: Design) -> int:
        """Return how many trials train beside each other; for Slurm 8 is a guess."""
        kind, processes = type(self.launcher).__name__, design.any.accelerate.num_processes
        return {"BasicLauncher": 1, "SlurmLauncher": 8}.get(kind) or workers_here(processes)

    def _designs(self, request: Request) -> Iterator[Design]:
        """Yield the design of each study: one, or one for each value of the family's key."""
        key, values = self.config.family.key, list(self.config.family["values"])
        if not key:
            yield self._design(request, {})
            return
        family = ""
        for value in values:
            design = self._design(request, {str(key): value})
            family = family or f"{_name(design.any)}-{str(key).rpartition('.')[2]}"
            named = FamilyConfig(key=key, values=values, name=family, value=value)
            study = f"{family}-{value:g}"
            base = replace(design.base, study=study, family=named)
            arms = {a: [replace(c, study=study, family=named) for c in found] for a, found in design.arms.items()}
            make = _in_study(design.make, study, named)
            yield replace(design, base=base, arms=arms, make=make)

    def _design(self, request: Request, fixed: Mapping[str, Any]) -> Design:
        common = [*request.common, *(f"{key}={value}" for key, value in fixed.items())]
        base = self.composer.compose([*common, "+method=sft", "seed=0"])

        def make(arm: str, params: Params) -> RunConfig:
            return replace(self.composer.compose([*common, f"+method={arm}"], params), study=study)

        study = None
        arms = {}
        for arm, space in request.spaces.items():
            for key, values in space.items():
                if is_interval(values):  # what lies between two ends that are allowed is allowed
                    rest = {k: v[0] if not is_interval(v) else v["low"] for k, v in space.items()}
                    self.composer.compose([*common, f"+method={arm}"], rest | {key: values["high"]})
            found = configs_of(arm, space, base.search)
            arms[arm] = self.composer.compose_all([([*common, f"+method={arm}"], params) for params in found])
        suggested = base.search.trials or 0 if base.search.sampler == "tpe" else 0
        sizes = {arm: suggested or len(found) for arm, found in arms.items()}
        check_study(request, sizes, base.evaluate, allow_unequal=base.allow_unequal_budgets)
        design = Design(base, arms, request.spaces, request.seeds, request.tuning_seeds, make, tuple(base.evaluate))
        _check_looks(design)
        arm, params = _first(request)  # any config has the study's name: the method's keys are no part of it
        study = _name(self.composer.compose([*common, f"+method={arm}"], params))
        arms = {arm: [replace(config, study=study) for config in found] for arm, found in arms.items()}
        return replace(design, base=replace(base, study=study), arms=arms)

    def _launch(self, trials: Sequence[RunConfig]) -> list[Outcome]:
        """Launch trials as Hydra jobs; where vLLM answers, all are trained first and then answered for in one pass."""
        with show_progress(trials):
            if trials[0].generate.backend == "vllm":
                trained = self._run([replace(trial, evaluate=[]) for trial in trials])
                try:
                    answer_trials(trials)
                except RuntimeError as error:
                    why = f"generate: {error}"
                    return [replace(x, status="failed", message=why) if x.status == "complete" else x for x in trained]
            return self._run(trials)

    def _run(self, trials: Sequence[RunConfig]) -> list[Outcome]:
        """Run Hydra jobs: each gets what was decided here, where another machine might find something else."""
        jobs = []
        for trial in trials:
            added = {
                "seed": trial.seed,
                "study": trial.study,
                "evaluate": f"[{','.join(trial.evaluate)}]",
                "generate.backend": trial.generate.backend,
            }
            if trial.cost_name:
                added |= {"cost_name": trial.cost_name, "train.reference": trial.train.reference.value}
            typed = [line for line in self.composer.overrides(trial) if line.partition("=")[0] not in added]
            jobs.append([*typed, *(f"{key}={value}" for key, value in added.items())])
        return [
            outcome
            for part in self._parts(trials)
            for outcome in self._survive([trials[n] for n in part], [jobs[n] for n in part])
        ]

    def _parts(self, trials: Sequence[RunConfig]) -> list[range]:
        """Split the jobs: one by one where they run in this process, some at a time where each gets a process at once.

        Hydra keeps the configs of every job until the launch ends: thousands of objects a job, which take memory and
        which the garbage collector would look at in every later trial.
        """
        size = len(trials)
        if type(self.launcher).__name__ == "BasicLauncher":
            size = 1
        elif type(self.launcher).__name__ == "LocalLauncher":
            size = _WAITING * workers_here(trials[0].accelerate.num_processes)
        return [range(start, min(start + size, len(trials))) for start in range(0, len(trials), size)]

    def _survive(self, trials: Sequence[RunConfig], jobs: Sequence[Sequence[str]]) -> list[Outcome]:
        """Launch jobs; where the launcher gives up because a worker died, launch again those that are not complete.

        A job that still runs holds its trial's lock: its second launch waits for it, and finds the trial complete.
        """
        problem = ""
        for _ in range(1 + _RELAUNCHES):
            left = [n for n, trial in enumerate(trials) if is_left(trial)]
            try:
                returns: Sequence[JobReturn] = self.launcher.launch([jobs[n] for n in left], initial_job_idx=0)
            except UsageError:
                raise
            except Exception as error:  # each launcher has errors of its own for a worker that died
                problem = f"{type(error).__name__}: {one_line(str(error), 300)}"
                continue
            ended = dict(zip(left, returns, strict=True))
            return [
                outcome_of(trial, ended[n]) if n in ended else ended_before(trial, problem)
                for n, trial in enumerate(trials)
            ]
        return [ended_before(trial, problem) for trial in trials]


def _report_again(results: Sequence[StudyResult]) -> None:
    """Render the reports of a family once more: the first ones knew nothing of the later studies."""
    for result in results:
        if result.report:
            _, problem = report_study(result.report.parent)
            if problem:
                say(f"{result.report}: {problem}")


def _name(config: RunConfig) -> str:
    """Return the study's name; a plan of a model or data set that cannot be fetched here goes without the hash."""
    try:
        return folder_name(config)
    except UnreachableError:
        if not config.plan:
            raise
        return Path(config.model.path).name


def _in_study(make: Callable[[str, Params], RunConfig], study: str, family: FamilyConfig) -> Any:
    return lambda arm, params: replace(make(arm, params), study=study, family=family)


def _first(request: Request) -> tuple[str, Params]:
    arm, space = next(iter(request.spaces.items()))
    return arm, {key: values["low"] if is_interval(values) else values[0] for key, values in space.items()}


def _check_looks(design: Design) -> None:
    looks = design.base.decide.looks
    if looks and (looks != sorted(looks) or looks[-1] != len(design.seeds)):
        raise UsageError(
            f"decide.looks=[{','.join(map(str, looks))}]: numbers of seeds in rising order, the last one all "
            f"{len(design.seeds)} seeds (seed={','.join(map(str, design.seeds))})"
        )


def find_warnings_of(design: Design) -> Iterator[str]:
    """Yield what is likely to be regretted of a study's configs."""
    for configs in design.arms.values():
        for config in configs:
            yield from find_warnings(config)


def folder_name(trial: RunConfig) -> str:
    """Return the study's name; one derived from a model's folder keeps only what `study=` may hold."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", study_name(trial))[-200:].lstrip(".-")


def register_design(design: Design, command: Sequence[str], warnings: Sequence[str]) -> None:
    """Register the study; a place that cannot be written to is the user's to change."""
    try:
        register(design, ["python", "-m", *command], warnings=warnings)
    except OSError as error:
        results = design.base.results_dir
        if not str(error.filename).startswith(str(Path(results))):
            raise
        raise UsageError(
            f"results_dir={results}: {error.filename} cannot be written ({error.strerror}); give a folder that can"
        ) from error


def is_left(trial: RunConfig) -> bool:
    """Whether a trial is to be launched in this run of the command: not complete, nor failed by an error of its own."""
    return not is_complete(trial, tuple(trial.evaluate)) and not own_failure(trial_dir(trial))


def outcome_of(trial: RunConfig, job: Any) -> Outcome:
    """Read how a job ended; one that died before it could write failure.json counts as failed too."""
    try:
        return Outcome(**job.return_value)  # raises what the job raised
    except Exception as error:
        return Outcome("", trial.method.name, "", trial.seed, "failed", f"{type(error).__name__}: {error}")


def ended_before(trial: RunConfig, problem: str) -> Outcome:
    """Read how a trial ended in an earlier launch; one that left nothing was lost with its worker, for this reason."""
    if is_complete(trial, tuple(trial.evaluate)):
        return finished(trial)
    folder = trial_dir(trial)
    why, retries = own_failure(folder) or f"worker: {problem}", not standing_failure(folder)
    return Outcome(identify(trial), trial.method.name, config_label(trial), trial.seed, "failed", why, retries)
