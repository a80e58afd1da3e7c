"""The main job: `python -m harness.sweep +method=simpo,dpo` trains, generates, scores, decides and reports.

A Hydra application whose sweeper (`harness.sweeper`) plans and runs the study; here are its commands and its jobs.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from harness.config import CONF, compose_run, register_schemas, resolve
from harness.design import Design
from harness.devices import take_places
from harness.expand import hydra_arguments
from harness.folders import refuse_golden
from harness.outside import in_one_sentence
from harness.overrides import check_overrides, check_single, explain
from harness.plugins import register_plugins
from harness.protocol import StudyResult
from harness.records import UsageError
from harness.redaction import redact
from harness.sweeper import PairedSweeper, folder_name, register_design
from harness.terminal import print_result
from harness.trial import run_trial
from harness.validate import find_warnings

# What Hydra answers by itself: help, the composed config, shell completion.
_HYDRA_FLAGS = ("--help", "-h", "--hydra-help", "--cfg", "-c", "--info", "-i", "--shell-completion", "-sc", "--version")


def run_job(composed: DictConfig) -> dict[str, Any]:
    """Run one trial as a Hydra job, in whatever process the launcher chose; what it raises is kept by launchers."""
    prepare_process()
    try:
        return _run_job(composed)
    except Exception as error:
        if (message := redact(error)) == str(error):
            raise
        raise RuntimeError(f"{type(error).__name__}: {message}") from None


def _run_job(composed: DictConfig) -> dict[str, Any]:
    config = resolve(composed)
    launcher = str(HydraConfig.get().launcher.get("_target_", "")).rpartition(".")[2]
    take_places(launcher, config.accelerate.num_processes)
    return asdict(run_trial(config, tuple(config.evaluate)))


def run_sweep(arguments: Sequence[str]) -> list[StudyResult]:
    """Run the main job on command-line arguments and return its results (none for `plan=true` and `--help`).

    Raises:
        UsageError: for wrong usage, before anything is loaded.
    """
    prepare_process()
    register_schemas()
    register_plugins()
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
    return result


def _check_options(arguments: Sequence[str], *, allowed: Sequence[str] = ()) -> None:
    for argument in arguments:
        if argument.startswith("-") and argument not in allowed:
            raise UsageError(f"{argument}: unknown option; write KEY=VALUE, and see --help for the keys")


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
        config = replace(config, study=folder_name(config))
        shared = [item for item in arguments if not item.lstrip("+").startswith(("method", "arms.", "seed="))]
        base = replace(compose_run([*shared, "+method=sft", "seed=0"]), study=config.study)
        arm = config.method.name
        design = Design(base, {arm: [config]}, {arm: {}}, [config.seed], [], lambda *_: config, config.evaluate)
        register_design(design, ["harness.train", *arguments], find_warnings(config))
        refuse_golden(config, config.evaluate)
    except UsageError as error:
        print(f"harness.train: {redact(error)}", file=sys.stderr)
        return 2
    take_places("BasicLauncher", config.accelerate.num_processes)
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
    warnings.filterwarnings("ignore", message=r"(?s).*is validated against ConfigStore schema")
    for package in ("transformers", "trl", "peft", "accelerate", "huggingface_hub"):
        warnings.filterwarnings("ignore", module=rf"{package}\b")


@in_one_sentence("harness.sweep")
def main() -> None:
    """Run the command."""
    try:
        results = run_sweep(sys.argv[1:])
    except BrokenPipeError:  # `plan=true | head`: whoever read has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except UsageError as error:
        print(f"harness.sweep: {redact(error)}", file=sys.stderr)
        sys.exit(2)
    sys.exit(max((print_result(result) for result in results), default=0))


if __name__ == "__main__":
    main()
