"""The main job: `python -m harness.sweep +method=simpo,dpo` trains, generates, scores, decides and reports.

Hydra stands at this edge alone: the command line is composed here once, and trials get finished configs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import hydra
from hydra import compose
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.types import HydraContext
from omegaconf import DictConfig

from harness.config.compose import register_schemas
from harness.config.launchers import LAUNCHERS
from harness.config.machine import Machine, job_problem, processes_problem
from harness.config.overrides import check_overrides, check_single, explain
from harness.config.paths import CONF, typed_home
from harness.decide.recommend import last_lines
from harness.decide.rule import check_expected, expectation_problem
from harness.decide.words import ranking_lines, table_lines, warning_lines
from harness.study.errors import UsageError
from harness.study.integrity import SPLITS
from harness.study.log import prepare_process
from harness.study.outcome import Outcome
from harness.study.registration import contrast_of, read_study
from harness.study.text import redact, visible
from harness.sweep.chances import guard_lines
from harness.sweep.design import Composer, Design, designs_of, expand, shared_overrides, warnings_of
from harness.sweep.estimate import print_plan, refuse_too_little_memory, refuse_what_does_not_fit
from harness.sweep.launch import Launching
from harness.sweep.problems import checkpoint_warnings, compose_run, composing, find_warnings
from harness.sweep.protocol import StudyResult, report_study, run_study
from harness.sweep.registration import folder_name, register
from harness.sweep.remembered import with_registered_rule, with_registered_seeds
from harness.sweep.stages import run_trial
from harness.sweep.trial import Context, Trial

# What Hydra answers by itself: help, the composed config, shell completion.
_HYDRA_FLAGS = ("--help", "-h", "--hydra-help", "--cfg", "-c", "--info", "-i", "--shell-completion", "-sc", "--version")


_DEV_ONLY = "--dev-only"
_TRAIN_HELP = f"""Train, generate and score one trial.

Example: python -m harness.train +method=dpo seed=1
{_DEV_ONLY}: answer dev alone, so that golden stays unseen; for tuning by W&B agents (sweeps/agents/)."""


def run_sweep(arguments: Sequence[str]) -> list[StudyResult]:
    """Run the main job on command-line arguments and return a result per study (none for `plan=true` and `--help`).

    Raises:
        UsageError: for wrong usage, before anything is loaded.
    """
    prepare_process()
    if any(argument.split("=")[0] in _HYDRA_FLAGS for argument in arguments):
        _answer_as_hydra(arguments)
        return []
    _check_options(arguments, allowed=("--multirun", "-m"))
    parsed = check_overrides(typed_home(argument for argument in arguments if not argument.startswith("-")))
    with _context() as context, composing():
        with explain():
            master = compose("sweep", shared_overrides(parsed), return_hydra_config=True)
        request = with_registered_rule(expand(parsed, master), parsed, master)
        studies = designs_of(request, master, Composer(), context.inputs, folder_name, with_registered_seeds)
        designs = list(studies)
        for design in designs:
            _check_expected(design)
        warnings = [[*warnings_of(design), *checkpoint_warnings(design.any, context.inputs)] for design in designs]
        launching = Launching.configured(master, _hydra_context(master), context)
        if master.plan:
            for design, found in zip(designs, warnings, strict=True):
                if not launching.kind.is_elsewhere:
                    refuse_too_little_memory(design, context.machine)
                at_once = launching.kind.at_once(context.machine, design.any.accelerate.num_processes)
                print_plan(design, found, context.machine, at_once)
            return []
        for design in designs:
            _refuse_what_cannot_run(design, launching, context.machine)
        for design, found in zip(designs, warnings, strict=True):
            print("\n".join(guard_lines(design)), end="\n" if design.any.decide.guards else "")
            register(design, ["harness.sweep", *arguments], warnings=found)
        results = [run_study(design, launching.run, context) for design in designs]
        if len(results) > 1:
            _report_again(results)
        return results


@contextmanager
def _context() -> Iterator[Context]:
    context = Context()
    try:
        yield context
    finally:
        context.slots.release()


def _hydra_context(master: DictConfig) -> HydraContext:
    return HydraContext(config_loader=GlobalHydra.instance().config_loader(), callbacks=Callbacks(master))


def _answer_as_hydra(arguments: Sequence[str]) -> None:
    """Let Hydra answer its own options: `--help`, `--cfg job`, shell completion."""
    register_schemas()
    application = hydra.main(version_base="1.3", config_path=str(CONF), config_name="sweep")(lambda config: None)
    argv, sys.argv = sys.argv, [sys.argv[0], *arguments]
    try:
        os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach us: Hydra would print them and exit with 1
        with explain():
            application()
    finally:
        sys.argv = argv


def _check_options(arguments: Sequence[str], *, allowed: Sequence[str] = ()) -> None:
    for argument in arguments:
        if argument.startswith("-") and argument not in allowed:
            raise UsageError(f"{argument}: unknown option; write KEY=VALUE, and see --help for the keys")


def _check_expected(design: Design) -> None:
    """Refuse an expectation that no verdict of the study can meet."""
    expected, path = design.any.expect, design.study / "study.yaml"
    if expected is not None:
        registered = read_study(path)["contrast"] if path.is_file() else []
        check_expected(expected, registered or contrast_of(list(design.arms)))


def _refuse_what_cannot_run(design: Design, launching: Launching, machine: Machine) -> None:
    """Refuse a study for which this machine or the cluster's jobs have too little disk or too few devices."""
    accelerate = design.any.accelerate
    refuse_what_does_not_fit(design, machine, launching.kind.at_once(machine, accelerate.num_processes))
    problem = "" if launching.kind.is_elsewhere else processes_problem(accelerate, machine)
    if not problem and not launching.kind.is_elsewhere:
        refuse_too_little_memory(design, machine)
    if problem := problem or job_problem(launching.requested, accelerate):
        raise UsageError(problem)


def _report_again(results: Sequence[StudyResult]) -> None:
    """Render the reports of a family once more: the first ones were made before the later studies."""
    for result in results:
        if result.report:
            report_study(result.report.parent)


def run_single(arguments: Sequence[str]) -> int:
    """Run one trial (and the SFT base, which it needs): the body of `python -m harness.train`."""
    prepare_process()
    if {"--help", "-h"} & set(arguments):
        print(_TRAIN_HELP)
        return 0
    with _context() as context:
        try:
            base, trial = _single_trial(arguments, context)
        except UsageError as error:
            print(f"harness.train: {redact(error)}", file=sys.stderr)
            return 2
        context.slots.take(LAUNCHERS["basic"], trial.config.accelerate.num_processes)
        outcome = run_trial(base, context)
        if outcome.status != "failed":
            outcome = run_trial(trial, context)
    print(f"{outcome.arm} {outcome.config} seed {outcome.seed}: {outcome.status} {outcome.message}")
    return 1 if outcome.status == "failed" else 0


def _single_trial(arguments: Sequence[str], context: Context) -> tuple[Trial, Trial]:
    """Register the study of one trial; return the SFT base and the trial."""
    _check_options(arguments, allowed=(_DEV_ONLY,))
    overrides = typed_home(argument for argument in arguments if argument != _DEV_ONLY)
    splits = ("dev",) if _DEV_ONLY in arguments else SPLITS
    check_single(overrides)
    check_overrides(overrides)
    config = compose_run(overrides)
    shared = [item for item in overrides if not item.lstrip("+").startswith(("method", "arms.", "seed="))]
    base_config = compose_run([*shared, "+method=sft", "seed=0"])
    arm = config.method.name
    design = Design(base_config, {arm: [config]}, {arm: {}}, [config.seed], [], context.inputs)
    design = design.in_study(folder_name(config, context.inputs))
    warnings = [*find_warnings(config), *checkpoint_warnings(config, context.inputs)]
    register(design, ["harness.train", *arguments], warnings=warnings)
    trial = design.trial(design.any, config.seed, splits)
    trial.refuse_golden()
    return replace(design.base, splits=splits), trial


def print_result(result: StudyResult) -> int:
    """Print the table, the warnings, the verdict and the recommendation; return the exit status.

    1 if a trial failed or there is no verdict, 3 if the verdict is not the expected one.
    """
    failed = [outcome for outcome in result.outcomes if outcome.status == "failed"]
    verdict = result.verdict
    if verdict:
        print("\n".join(["", *table_lines(verdict), *ranking_lines(verdict), *warning_lines(verdict)]))
    for outcome in failed:
        print(f"failed: {_name(outcome)}: {visible(redact(outcome.message))}")
    for problem in result.problems:
        print(f"scorer failed: {visible(redact(problem))}")
    if failed:
        print(f"{len(failed)} of {len(result.outcomes)} trials failed; the rest is kept: {_again(failed)}")
    stages = ", ".join(f"{stage} {count}" for stage, count in result.stages.items() if count)
    print(f"trials run now: {result.launched}, complete before: {len(result.outcomes) - result.launched} ({stages})")
    if result.report:
        print(f"report: {result.report}")
    if result.unreported:
        print(f"no report: {visible(result.unreported)}")
    unexpected = expectation_problem(verdict, result.expected) if verdict and result.expected else ""
    if unexpected:
        print(unexpected)
    lines = last_lines(verdict) if verdict else [f"no verdict: {redact(result.undecided)}"]
    print("\n".join(["", *lines]))
    is_missing = bool(result.unreported) or (result.is_comparison and not verdict)
    return 1 if failed or result.problems or is_missing else 3 if unexpected else 0


def _again(failed: Sequence[Outcome]) -> str:
    """Return which command runs failed trials again."""
    standing = sum(not outcome.retries for outcome in failed)
    if not standing:
        return "mend the cause, and the same command runs them again"
    which = "them" if standing == len(failed) else f"all of them, and without it {len(failed) - standing},"
    return f"the same command with retry_failed=true runs {which} again"


def _name(outcome: Outcome) -> str:
    return f"{outcome.arm} {outcome.config} seed {outcome.seed} ({outcome.trial_id})"
