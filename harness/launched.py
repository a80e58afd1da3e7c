"""Jobs of a launcher: which trials are left to launch, and how those ended that were. Imports no torch."""

from __future__ import annotations

from typing import Any

from harness.config import config_label
from harness.failure import own_failure, standing_failure
from harness.folders import is_complete, trial_dir
from harness.inputs import identify
from harness.protocol import finished
from harness.schema import RunConfig
from harness.trial import Outcome


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
