"""Mirror a trial or a study to a Weights & Biases run, offline by default.

Metrics, tables and pages in -> a W&B run. Tracking never stops or fails a trial: whatever W&B does, the trial's own
files are complete.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, TypeVar

from harness.config.schema import RunConfig, TrackingConfig
from harness.study.files import Json, digest
from harness.study.log import say
from harness.study.outcome import SPLIT_PREFIX, STEP
from harness.study.text import one_line

if TYPE_CHECKING:
    from wandb import Run

INIT_TIMEOUT_SECONDS = 20  # an unreachable server blocks wandb.init for 90 s by default
# A run uploads its content in seconds. With a server that hangs, wandb 0.31 retries without end, `finish_timeout` or
# not: a rejected artifact (a table is one) blocks everything after it.
WAIT_SECONDS = 30
MAX_TABLE_ROWS = 1000

T = TypeVar("T")


class Tracker(Protocol):
    """One run, open until the context manager that made it ends."""

    def log(self, metrics: Mapping[str, Json]) -> None:
        """Log one row of metrics."""

    def summarise(self, values: Mapping[str, object]) -> None:
        """Set final values."""

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Json]]) -> None:
        """Log a table; rows after the first `MAX_TABLE_ROWS` are left out."""

    def page(self, name: str, path: Path) -> None:
        """Log an HTML or SVG file."""


class Trackers:
    """The tracked runs of one process; remembers a failed connection, so that later runs do not wait for it again.

    Attributes:
        is_offline: whether W&B failed online in this process; later runs are offline.
    """

    def __init__(self) -> None:
        self.is_offline = False

    def modes(self, wanted: str) -> Sequence[Literal["online", "offline"]]:
        """Return the modes to try, in order."""
        return ["offline"] if self.is_offline or wanted == "offline" else ["online", "offline"]


@contextlib.contextmanager
def track(
    tracking: TrackingConfig,
    *,
    folder: Path,
    name: str,
    group: str,
    job_type: str,
    tags: Sequence[str],
    config: Mapping[str, object],
    trackers: Trackers | None = None,
) -> Iterator[Tracker]:
    """Open one run and close it in every case; an exception inside marks the run as failed and is raised again.

    Args:
        tracking: backend, project, entity and mode; backend `none` yields a tracker that does nothing.
        folder: parent of the offline files (`folder/wandb/`).
        name: name of the run; with group and config it makes the run's id, so that a repeated run is the same run.
        group: the study.
        job_type: the arm, or `study`.
        tags: for filtering.
        config: the full config, as JSON values.
        trackers: shared by all runs of a process; None for a run by itself.
    """
    trackers = trackers or Trackers()
    run = None
    if tracking.backend == "wandb":
        about = _About(name, group, job_type, list(tags), dict(config))
        run = _start(tracking, folder, about, trackers)
    if run is None:
        yield NoTracker()
        return
    tracker = WandbTracker(run, trackers)
    tracker.define_metrics()
    exit_code = 1
    try:
        yield tracker
        exit_code = 0
    finally:
        tracker.finish(exit_code)


class _About(NamedTuple):
    """The arguments of `track` that describe a run."""

    name: str
    group: str
    job_type: str
    tags: list[str]
    config: dict[str, object]


def _start(tracking: TrackingConfig, folder: Path, about: _About, trackers: Trackers) -> Run | None:
    """Start a run in the requested mode; online falls back to offline; None where offline fails too."""
    os.environ.setdefault("WANDB_SILENT", "true")
    # Its error reports go to the same server, and delay the end of a process by 20 s where that hangs.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    folder.mkdir(parents=True, exist_ok=True)
    for mode in trackers.modes(tracking.mode):
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
                id=digest([about.group, about.name, about.config])[:16],
                **about._asdict(),
            )
        except Exception as error:  # W&B's errors have no common base
            stop_service()
            then = ""
            if mode == "online":
                trackers.is_offline = True
                then = "; this run and the later ones of this process are tracked offline"
            say(f"W&B {mode}: {type(error).__name__}: {one_line(error)}{then}")
    say("W&B could not be started; the trial goes on untracked")
    return None


class WandbTracker:
    """A W&B run. After the first error of W&B, or the first call that hangs, it reports that once and logs no more."""

    def __init__(self, run: Run, trackers: Trackers) -> None:
        self._run = run
        self._trackers = trackers
        self.failed = False

    def _try(self, call: Callable[[], object]) -> None:
        if self.failed:
            return
        try:
            _within(WAIT_SECONDS, call)
        except Exception as error:  # W&B's errors have no common base, and none of them is worth a trial
            problem = f"{type(error).__name__}: {one_line(error)}"
            say(f"W&B: {problem}; this run is not tracked further, its files are complete")
            self.failed = True

    def define_metrics(self) -> None:
        """Plot all metrics over optimiser steps, and keep the lowest training loss beside the last."""
        self._try(self._define_metrics)

    def _define_metrics(self) -> None:
        self._run.define_metric(STEP, hidden=True)
        for prefix in ("train", *SPLIT_PREFIX.values()):
            self._run.define_metric(f"{prefix}/*", step_metric=STEP)
        self._run.define_metric("train/loss", step_metric=STEP, summary="min,last")

    def log(self, metrics: Mapping[str, Json]) -> None:
        """Log one row of metrics."""
        self._try(lambda: self._run.log(dict(metrics)))

    def summarise(self, values: Mapping[str, object]) -> None:
        """Set final values."""
        self._try(lambda: self._run.summary.update(dict(values)))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Json]]) -> None:
        """Log a table."""
        import wandb

        data = [list(row) for row in rows[:MAX_TABLE_ROWS]]
        self._try(lambda: self._run.log({name: wandb.Table(columns=list(columns), data=data)}))

    def page(self, name: str, path: Path) -> None:
        """Log an HTML or SVG file."""
        import wandb

        self._try(lambda: self._run.log({name: wandb.Html(path.read_text(encoding="utf-8"), inject=False)}))

    def finish(self, exit_code: int) -> None:
        """Close the run; wait at most `WAIT_SECONDS` for its uploads, and leave the rest on disk."""
        try:
            _within(WAIT_SECONDS, lambda: self._run.finish(exit_code=exit_code))
        except Exception as error:
            stop_service()
            self._trackers.is_offline = True
            kept = f"`wandb sync --no-skip-online {self._run.settings.sync_dir}` uploads what is on disk"
            problem = f"{type(error).__name__}: {one_line(error)}"
            say(f"W&B at the end of a run: {problem}; {kept}; further runs of this process are tracked offline")


class NoTracker:
    """The tracker for `tracking=none`: the calling code has no `if`."""

    def log(self, metrics: Mapping[str, Json]) -> None:
        """Do nothing."""

    def summarise(self, values: Mapping[str, object]) -> None:
        """Do nothing."""

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Json]]) -> None:
        """Do nothing."""

    def page(self, name: str, path: Path) -> None:
        """Do nothing."""


def _within(seconds: float, call: Callable[[], T]) -> T:
    """Run a call in a thread of its own and return its result; the thread of a call that hangs is abandoned.

    Raises:
        TimeoutError: no result after `seconds`.
    """
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return outcome.result(seconds)
    except TimeoutError:
        if outcome.done():  # the call itself raised it
            raise
        raise TimeoutError(f"no answer in {seconds:g} s") from None


def stop_service() -> None:
    """Kill W&B's service process: it holds the run's id, and this process would wait for it before it exits."""
    import psutil
    import wandb

    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if child.name() == "wandb-core":
                child.kill()
    with contextlib.suppress(Exception, SystemExit):  # it exits with the status of the killed process
        _within(WAIT_SECONDS, wandb.teardown)
    os.environ.pop("WANDB_SERVICE", None)  # inherited from a parent: the next run must not ask it either


def problems(config: RunConfig) -> Iterator[str]:
    """Yield the problems of the section `tracking`."""
    project = config.tracking.project
    if not project.strip() or len(project) > 128 or set(project) & set("/\\#?%:"):
        yield (
            f"tracking.project={project}: W&B wants a name of at most 128 characters with no `/`, `\\`, `#`, `?`, "
            "`%` or `:` in it"
        )
