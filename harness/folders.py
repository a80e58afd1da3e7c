"""Where a study and its trials are kept, how far a trial has come, and whether it may see golden. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from harness.arms import ARMS
from harness.config import config_label
from harness.inputs import identify
from harness.manifest import read_manifest
from harness.records import UsageError
from harness.schema import RunConfig
from harness.selection import golden_problem
from harness.stages import done_stages

SPLITS = ("dev", "golden")


def study_dir(config: RunConfig) -> Path:
    """Return the study's folder."""
    return Path(config.results_dir) / str(config.study)


def trial_dir(config: RunConfig) -> Path:
    """Return the trial's folder; the SFT base has one of its own, and so have trials run for their cost."""
    study = study_dir(config)
    if config.cost_name:
        return study / "costs" / config.cost_name
    return study / "trials" / identify(config) if ARMS[config.method.name].trainer else study / "base"


def is_complete(config: RunConfig, splits: tuple[str, ...] = SPLITS) -> bool:
    """Return True where the trial's manifest says that all stages were done for this very config."""
    manifest = read_manifest(trial_dir(config))
    if manifest.get("trial_id") != identify(config):
        return False
    return {"score", *splits} <= done_stages(trial_dir(config), manifest)


def refuse_golden(config: RunConfig, splits: Sequence[str]) -> None:
    """Raise a UsageError where this run of its study must not be scored on golden."""
    if "golden" in splits and ARMS[config.method.name].trainer:
        problem = golden_problem(study_dir(config), config.method.name, config_label(config), config.seed)
        if problem:
            raise UsageError(problem)
