"""The main job: `python -m harness.sweep +method=simpo,dpo` trains, generates, scores, decides and reports.

A Hydra application. Its sweeper (`harness.sweep.sweeper`) plans and runs the study; this file has its jobs.
"""

from __future__ import annotations

import importlib
import os
import sys
import types
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from omegaconf import DictConfig

from harness.config.compose import register_schemas
from harness.config.overrides import check_overrides, check_single, explain
from harness.config.paths import CONF
from harness.study.errors import UsageError
from harness.study.log import prepare_process
from harness.study.text import redact
from harness.sweep.launchers import RayLauncher, take_places
from harness.sweep.problems import compose_run, find_warnings, resolve
from harness.sweep.protocol import StudyResult
from harness.sweep.registration import refuse_golden
from harness.sweep.request import Design, hydra_arguments
from harness.sweep.sweeper import PairedSweeper, folder_name, register_design
from harness.sweep.trial import run_trial

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


_PLUGINS = {"harness_sweeper": PairedSweeper, "harness_launcher": RayLauncher}


@dataclass
class SweeperConfig:
    """Selects the sweeper in Hydra's config."""

    _target_: str = "hydra_plugins.harness_sweeper.PairedSweeper"


def register_plugins() -> None:
    """Put the classes where Hydra looks, and the sweeper's config into its store."""
    try:
        parent = importlib.import_module("hydra_plugins")
    except ImportError:
        parent = sys.modules["hydra_plugins"] = types.ModuleType("hydra_plugins")
        parent.__path__ = []
    for name, plugin in _PLUGINS.items():
        alias = f"hydra_plugins.{name}"
        module = types.ModuleType(alias)
        setattr(module, plugin.__name__, plugin)
        sys.modules[alias] = module
        setattr(parent, name, module)
        plugin.__module__ = alias
        Plugins.instance().register(plugin)
    ConfigStore.instance().store(group="hydra/sweeper", name="paired", node=SweeperConfig, provider="harness")
