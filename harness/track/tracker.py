"""Mirror trials and studies to Weights & Biases, or to nothing. The only file that knows wandb.

Tracking never stops or fails a trial: whatever W&B does, the trial's own files are complete. Offline by default.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

from harness.config.schema import TrackingConfig
from harness.study.files import digest
from harness.study.log import say
from harness.study.outcome import SPLIT_PREFIX, STEP
from harness.study.text import one_line

INIT_TIMEOUT_SECONDS = 20  # an unreachable server blocks wandb.init for 90 s by default
# What a run has is uploaded in seconds; a server that hangs keeps wandb 0.31 trying without end, `finish_timeout` or
# not: an artifact that it does not take (a table is one) blocks all that comes after it.
WAIT_SECONDS = 30
MAX_TABLE_ROWS = 1000
_failed_modes: set[str] = set()  # holds `online` where that failed in this process: later trials do not wait again


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
    """A W&B run; after the first error of W&B's, or a call that hangs, it goes quiet, and says so once."""

    def __init__(self, run: Any) -> None:
        self._run = run
        self.failed = False

    def _try(self, call: Callable[[], Any]) -> None:
        if self.failed:
            return
        try:
            _within(WAIT_SECONDS, call)
        except Exception as error:  # W&B's errors have no common base, and none of them is worth a trial
            said = f"{type(error).__name__}: {one_line(error)}"
            say(f"W&B: {said}; this run is not tracked further, its files are complete")
            self.failed = True

    def define_metrics(self) -> None:
        """Plot everything over optimiser steps, and keep the lowest training loss beside the last."""
        self._try(self._define_metrics)

    def _define_metrics(self) -> None:
        self._run.define_metric(STEP, hidden=True)
        for prefix in ("train", *SPLIT_PREFIX.values()):
            self._run.define_metric(f"{prefix}/*", step_metric=STEP)
        self._run.define_metric("train/loss", step_metric=STEP, summary="min,last")

    def log(self, metrics: dict[str, Any]) -> None:
        """Log one row of metrics."""
        self._try(lambda: self._run.log(metrics))

    def summarise(self, values: dict[str, Any]) -> None:
        """Set final values."""
        self._try(lambda: self._run.summary.update(values))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Log a table."""
        import wandb

        data = [list(row) for row in rows[:MAX_TABLE_ROWS]]
        self._try(lambda: self._run.log({name: wandb.Table(columns=list(columns), data=data)}))

    def page(self, name: str, path: Path) -> None:
        """Log an HTML or SVG file."""
        import wandb

        self._try(lambda: self._run.log({name: wandb.Html(path.read_text(encoding="utf-8"), inject=False)}))

    def finish(self, exit_code: int) -> None:
        """Close the run, and wait so long for what is not uploaded yet; the rest stays on disk."""
        try:
            _within(WAIT_SECONDS, lambda: self._run.finish(exit_code=exit_code))
        except Exception as error:
            _stop_service()
            _failed_modes.add("online")
            kept = f"`wandb sync --no-skip-online {self._run.settings.sync_dir}` uploads what is on disk"
            said = f"{type(error).__name__}: {one_line(error)}"
            say(f"W&B at the end of a run: {said}; {kept}; further runs of this process are tracked offline")


def _within(seconds: float, call: Callable[[], Any]) -> Any:
    """Make a call in a thread of its own and return what it returns; the thread of a call that hangs is left behind.

    Raises:
        TimeoutError: it has not ended after so many seconds.
    """
    outcome: Future[Any] = Future()

    def run() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return outcome.result(seconds)
    except TimeoutError:
        if outcome.done():  # it is the call's own
            raise
        raise TimeoutError(f"no answer in {seconds:g} s") from None


def _stop_service() -> None:
    """End W&B's own process: it holds the run's id, and this process would wait for it at its end."""
    import psutil
    import wandb

    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if child.name() == "wandb-core":
                child.kill()
    with contextlib.suppress(Exception, SystemExit):  # it exits with the status of the process that was killed
        _within(WAIT_SECONDS, wandb.teardown)
    os.environ.pop("WANDB_SERVICE", None)  # inherited from a parent: the next run must not ask it either


@contextlib.contextmanager
def track(
    tracking: TrackingConfig,
    *,
    folder: Path,
    name: str,
    group: str,
    job_type: str,
    tags: Sequence[str],
    config: Mapping[str, Any],
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
        tracker.finish(exit_code)


def _start(tracking: TrackingConfig, folder: Path, **run: Any) -> Any:
    """Start a run in the mode asked for; online falls back to offline; None where even that fails."""
    os.environ.setdefault("WANDB_SILENT", "true")
    # Its reports on itself go to the same server, and hold up the end of a process for 20 s where that hangs.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    folder.mkdir(parents=True, exist_ok=True)
    modes: list[Any] = [mode for mode in dict.fromkeys([tracking.mode, "offline"]) if mode not in _failed_modes]
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
                    x_transaction_log_flush_interval=1,  # seconds; 15 would lose a run's end where its process dies
                ),
                **run,
            )
        except Exception as error:
            _stop_service()
            then = ""
            if mode == "online":
                _failed_modes.add(mode)
                then = "; this run and the later ones of this process are tracked offline"
            say(f"W&B {mode}: {type(error).__name__}: {one_line(error)}{then}")
    say("W&B could not be started; the trial goes on untracked")
    return None
