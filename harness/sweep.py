"""The main job: `python -m harness.sweep +method=simpo,dpo` trains, generates, scores, decides and reports.

A Hydra application with a sweeper of its own: it expands an arm's keys for that arm only, checks all trials before the
first one starts, and launches them through whatever launcher is configured (`hydra/launcher=...`).
"""

from __future__ import annotations

import importlib
import os
import re
import sys
import types
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.sweeper import Sweeper
from omegaconf import DictConfig

from harness.config import CONF, RunConfig, compose_run, register_schemas, resolve
from harness.expand import expand, hydra_arguments
from harness.multilora import answer_trials
from harness.overrides import check_overrides, check_single, explain
from harness.protocol import StudyResult, run_study
from harness.records import UsageError
from harness.registration import register, study_name
from harness.terminal import print_plan, print_result, show_progress
from harness.trial import Outcome, run_trial
from harness.validate import find_warnings

# What Hydra answers by itself: help, the composed config, shell completion.
_HYDRA_FLAGS = ("--help", "-h", "--hydra-help", "--cfg", "-c", "--info", "-i", "--shell-completion", "-sc", "--version")
_ALIAS = "hydra_plugins.harness_sweeper"  # Hydra accepts plugin classes under hydra_plugins.* only


@dataclass
class SweeperConfig:
    """Selects the sweeper in Hydra's config."""

    _target_: str = f"{_ALIAS}.PairedSweeper"


class PairedSweeper(Sweeper):
    """Plan all trials of a study, check them, and run the protocol through Hydra's launcher.

    Attributes:
        on_result: called with the result: Hydra's main function returns nothing in a multirun.
        typed: the arguments as the user typed them; Hydra gets others.
    """

    typed: ClassVar[tuple[str, ...]] = ()
    on_result: ClassVar[Callable[[StudyResult], None]] = staticmethod(lambda result: None)

    def setup(self, *, hydra_context: Any, task_function: Any, config: DictConfig) -> None:
        """Keep what is needed to compose and launch jobs."""
        self.loader, self.config = hydra_context.config_loader, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def compose(self, overrides: Sequence[str]) -> RunConfig:
        """Compose and validate one trial."""
        with explain():
            return resolve(self.loader.load_sweep_config(self.config, list(overrides)))

    def sweep(self, arguments: list[str]) -> StudyResult | None:
        """Run the study, or print its trials where `plan=true`."""
        jobs = expand(arguments, self.config)
        trials = self._compose_all([job.overrides for job in jobs])
        name = _folder_name(trials[0])
        trials = [replace(trial, study=name) for trial in trials]
        base = replace(self.compose(jobs[0].base_overrides), study=name)
        regrets = list(dict.fromkeys(text for trial in trials for text in find_warnings(trial)))
        if trials[0].plan:
            print_plan(trials, regrets)
            return None
        _register(trials, ["harness.sweep", *type(self).typed], regrets)
        overrides = {id(trial): job.overrides for trial, job in zip(trials, jobs, strict=True)}
        known = {_key(base): jobs[0].base_overrides} | {_key(t): overrides[id(t)] for t in trials}
        with show_progress([base, *trials]):
            result = run_study(base, trials, lambda wanted: self._launch(wanted, known))
        type(self).on_result(result)
        return result

    def _compose_all(self, jobs: Sequence[Sequence[str]]) -> list[RunConfig]:
        trials, problems = [], []
        for job in jobs:
            try:
                trials.append(self.compose(job))
            except UsageError as error:
                problems += str(error).splitlines()
        if problems:
            raise UsageError("\n".join(dict.fromkeys(problems)))
        return trials

    def _launch(self, trials: Sequence[RunConfig], known: dict[tuple[Any, ...], list[str]]) -> list[Outcome]:
        """Launch trials as Hydra jobs; where vLLM answers, all are trained first and then answered for in one pass."""
        if trials[0].generate.backend == "vllm":
            trained = self._run([replace(trial, evaluate=[]) for trial in trials], known)
            try:
                answer_trials(trials)
            except RuntimeError as error:
                why = f"generate: {error}"
                return [replace(one, status="failed", message=why) if _is_ok(one) else one for one in trained]
        return self._run(trials, known)

    def _run(self, trials: Sequence[RunConfig], known: dict[tuple[Any, ...], list[str]]) -> list[Outcome]:
        """Run Hydra jobs; each gets the study's name, the splits that it may answer, and who answers."""
        jobs = []
        for trial in trials:
            typed = [override for override in known[_key(trial)] if not override.startswith("generate.backend=")]
            added = {
                "study": trial.study,
                "evaluate": f"[{','.join(trial.evaluate)}]",
                "generate.backend": trial.generate.backend,  # found here, where another machine might find another
            }
            jobs.append([*typed, *(f"{key}={value}" for key, value in added.items())])
        returns: Sequence[JobReturn] = self.launcher.launch(jobs, initial_job_idx=0)
        return [_outcome(trial, job) for trial, job in zip(trials, returns, strict=True)]


def _is_ok(outcome: Outcome) -> bool:
    return outcome.status == "complete"


def _key(trial: RunConfig) -> tuple[Any, ...]:
    return (repr(trial.method), trial.seed)


def _outcome(trial: RunConfig, job: JobReturn) -> Outcome:
    """Read how a job ended; one that died before it could write failure.json counts as failed too."""
    try:
        return Outcome(**job.return_value)
    except Exception as error:
        return Outcome("", trial.method.name, "", trial.seed, "failed", f"{type(error).__name__}: {error}")


def run_job(composed: DictConfig) -> dict[str, Any]:
    """Run one trial as a Hydra job, in whatever process the launcher chose."""
    prepare_process()
    config = resolve(composed)
    return asdict(run_trial(config, tuple(config.evaluate)))


def register_sweeper() -> None:
    """Make the sweeper known to Hydra without an installed `hydra_plugins` package (see hydra issue 2359)."""
    try:
        parent = importlib.import_module("hydra_plugins")
    except ImportError:
        parent = sys.modules["hydra_plugins"] = types.ModuleType("hydra_plugins")
        parent.__path__ = []
    module = types.ModuleType(_ALIAS)
    module.PairedSweeper = PairedSweeper  # type: ignore[attr-defined]
    sys.modules[_ALIAS] = module
    parent.harness_sweeper = module  # type: ignore[attr-defined]
    PairedSweeper.__module__ = _ALIAS
    Plugins.instance().register(PairedSweeper)
    ConfigStore.instance().store(group="hydra/sweeper", name="paired", node=SweeperConfig, provider="harness")


def run_sweep(arguments: Sequence[str]) -> StudyResult | None:
    """Run the main job on command-line arguments and return its result (None for `plan=true` and `--help`).

    Raises:
        UsageError: for wrong usage, before anything is loaded.
    """
    prepare_process()
    register_schemas()
    register_sweeper()
    PairedSweeper.typed = tuple(arguments)
    asks_hydra = any(argument.split("=")[0] in _HYDRA_FLAGS for argument in arguments)
    if not asks_hydra:
        _check_options(arguments, allowed=("--multirun", "-m"))
        check_overrides([argument for argument in arguments if not argument.startswith("-")])
        arguments = ["--multirun", *hydra_arguments(arguments)]
    result: list[StudyResult] = []
    application = hydra.main(version_base="1.3", config_path=str(CONF), config_name="sweep")(run_job)
    argv, sys.argv = sys.argv, [sys.argv[0], *arguments]
    PairedSweeper.on_result = staticmethod(result.append)
    try:
        os.environ["HYDRA_FULL_ERROR"] = "1"  # let errors through to us: Hydra would print them and exit with 1
        with explain():
            application()
    finally:
        sys.argv = argv
    return result[0] if result else None


def _check_options(arguments: Sequence[str], *, allowed: Sequence[str] = ()) -> None:
    for argument in arguments:
        if argument.startswith("-") and argument not in allowed:
            raise UsageError(f"{argument}: unknown option; write KEY=VALUE, and see --help for the keys")


def _folder_name(trial: RunConfig) -> str:
    """Return the study's name; one derived from a model's folder keeps only what `study=` may hold."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", study_name(trial))[-200:].lstrip(".-")


def _register(trials: Sequence[RunConfig], command: Sequence[str], regrets: Sequence[str]) -> None:
    """Register the study; a place that cannot be written to is the user's to change."""
    try:
        register(trials, ["python", "-m", *command], warnings=regrets)
    except OSError as error:
        results = trials[0].results_dir
        if not str(error.filename).startswith(str(Path(results))):
            raise
        raise UsageError(
            f"results_dir={results}: {error.filename} cannot be written ({error.strerror}); give a folder that can"
        ) from error


def run_single(arguments: Sequence[str]) -> int:
    """Run one trial (and the SFT base, which it needs): the body of `python -m harness.train`."""
    prepare_process()
    if {"--help", "-h"} & set(arguments):
        print("Train, generate and score one trial.\n\nExample: python -m harness.train +method=dpo seed=1")
        return 0
    try:
        _check_options(arguments)
        check_single([*arguments])
        check_overrides([*arguments])
        config = compose_run([*arguments])
        config = replace(config, study=_folder_name(config))
        shared = [item for item in arguments if not item.lstrip("+").startswith(("method", "arms.", "seed="))]
        base = replace(compose_run([*shared, "+method=sft", "seed=0"]), study=config.study)
        _register([config], ["harness.train", *arguments], find_warnings(config))
    except UsageError as error:
        print(f"harness.train: {error}", file=sys.stderr)
        return 2
    outcome = run_trial(base, tuple(config.evaluate))
    if outcome.status != "failed":
        outcome = run_trial(config, tuple(config.evaluate))
    print(f"{outcome.arm} {outcome.config} seed {outcome.seed}: {outcome.status} {outcome.message}")
    return 1 if outcome.status == "failed" else 0


def prepare_process() -> None:
    """Set what libraries read when they are imported: no chatter in the terminal, threads that sleep while they wait.

    Spinning threads (the default of GNU OpenMP) make two processes on one machine several times slower than one.
    """
    for name, value in {
        "OMP_WAIT_POLICY": "PASSIVE",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }.items():
        os.environ.setdefault(name, value)
    for package in ("transformers", "trl", "peft", "accelerate", "huggingface_hub"):
        warnings.filterwarnings("ignore", module=rf"{package}\b")


def main() -> None:
    """Run the command."""
    try:
        result = run_sweep(sys.argv[1:])
    except UsageError as error:
        print(f"harness.sweep: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(print_result(result) if result else 0)


if __name__ == "__main__":
    main()
