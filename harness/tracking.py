"""Mirror trials and studies to Weights & Biases, or to nothing. The only file that knows wandb.

Tracking never stops or fails a trial: whatever W&B does, the trial's own files are complete. Offline by default.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from harness.records import digest
from harness.schema import TrackingConfig
from harness.triallog import say

INIT_TIMEOUT_SECONDS = 20  # an unreachable server blocks wandb.init for 90 s by default
MAX_TABLE_ROWS = 1000
STEP = "train/global_step"  # transformers' name: runs of stock TRL scripts share the axis
SPLIT_PREFIX = {"dev": "eval", "golden": "golden"}


class Tracker(Protocol):
    """One run, open until the context manager that made it ends."""

    def log(self, metrics: dict[str, Any]) -> None:
        """Log one row of metrics."""

    def summarise(self, values: dict[str, Any]) -> None:
        """Set final values."""

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Log a table; rows after the first `MAX_TABLE_ROWS` are left out."""

    def page(self, name: str, path: Path) -> None:
        """Log an HTML or SVG file."""


class NoTracker:
    """The tracker for `tracking=none`: the calling code has no `if`."""

    def log(self, metrics: dict[str, Any]) -> None:
        """Do nothing."""

    def summarise(self, values: dict[str, Any]) -> None:
        """Do nothing."""

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Do nothing."""

    def page(self, name: str, path: Path) -> None:
        """Do nothing."""


class WandbTracker:
    """A W&B run; after the first error of W&B's it goes quiet, and says so once."""

    def __init__(self, run: Any) -> None:
        self._run = run
        self.failed = False

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # W&B's errors have no common base, and none of them is worth a trial
            if not self.failed:
                say(f"W&B: {type(error).__name__}: {error}; this run is not tracked further, its files are complete")
            self.failed = True

    def define_metrics(self) -> None:
        """Plot everything over optimiser steps, and keep the lowest training loss beside the last."""
        with self._guard():
            self._run.define_metric(STEP, hidden=True)
            for prefix in ("train", *SPLIT_PREFIX.values()):
                self._run.define_metric(f"{prefix}/*", step_metric=STEP)
            self._run.define_metric("train/loss", step_metric=STEP, summary="min,last")

    def log(self, metrics: dict[str, Any]) -> None:
        """Log one row of metrics."""
        with self._guard():
            self._run.log(metrics)

    def summarise(self, values: dict[str, Any]) -> None:
        """Set final values."""
        with self._guard():
            self._run.summary.update(values)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Log a table."""
        import wandb

        with self._guard():
            self._run.log({name: wandb.Table(columns=list(columns), data=[list(r) for r in rows[:MAX_TABLE_ROWS]])})

    def page(self, name: str, path: Path) -> None:
        """Log an HTML or SVG file."""
        import wandb

        with self._guard():
            self._run.log({name: wandb.Html(path.read_text(encoding="utf-8"), inject=False)})


@contextlib.contextmanager
def track(
    tracking: TrackingConfig,
    *,
    folder: Path,
    name: str,
    group: str,
    job_type: str,
    tags: Sequence[str],
    config: dict[str, Any],
) -> Iterator[Tracker]:
    """Open one run and close it whatever happens; an exception inside marks the run as failed and goes on up.

    Args:
        tracking: where to; `none` yields a tracker that does nothing.
        folder: where offline files go (`folder/wandb/`).
        name: the run's name; with group and config it also makes the run's id, so that a repeated run is the same run.
        group: the study.
        job_type: the arm, or `study`.
        tags: for filtering.
        config: the full config, as JSON values.
    """
    run = None
    if tracking.backend == "wandb":
        run_id = digest([group, name, config])[:16]
        run = _start(tracking, folder, name=name, group=group, job_type=job_type, tags=tags, config=config, id=run_id)
    if run is None:
        yield NoTracker()
        return
    tracker = WandbTracker(run)
    tracker.define_metrics()
    exit_code = 1
    try:
        yield tracker
        exit_code = 0
    finally:
        with tracker._guard():
            run.finish(exit_code=exit_code)


def _start(tracking: TrackingConfig, folder: Path, **run: Any) -> Any:
    """Start a run in the mode asked for; online falls back to offline; None where even that fails."""
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    folder.mkdir(parents=True, exist_ok=True)
    modes: list[Any] = list(dict.fromkeys([tracking.mode, "offline"]))
    for mode in modes:
        try:
            return wandb.init(
                project=tracking.project,
                entity=tracking.entity,
                dir=str(folder),
                mode=mode,
                reinit="finish_previous",  # an unfinished run would swallow this one
                settings=wandb.Settings(
                    silent=True,
                    console="off",
                    init_timeout=INIT_TIMEOUT_SECONDS,
                    x_disable_meta=True,  # it would write the command line, host and user name
                    save_code=False,
                    disable_git=True,
                ),
                **run,
            )
        except Exception as error:
            say(f"W&B {mode}: {type(error).__name__}: {error}")
    say("W&B could not be started; the trial goes on untracked")
    return None
