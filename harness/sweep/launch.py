"""Launch trials: one by one in this process, or as jobs of a Hydra launcher, each handed its trial as a JSON file.

Input: trials -> output: how they ended, in the same order. A job whose worker died is launched again.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher as HydraLauncher
from hydra.types import HydraContext
from hydra.utils import instantiate
from omegaconf import DictConfig, open_dict
from tqdm import tqdm

from harness.config.launchers import Launcher, launcher_of
from harness.generate.vllm import answers_path
from harness.study.errors import UsageError
from harness.study.files import FileCache
from harness.study.integrity import JOBS, done_stages
from harness.study.log import prepare_process
from harness.study.manifest import read_manifest
from harness.study.outcome import Outcome, own_failure, standing_failure
from harness.study.text import one_line, redact
from harness.sweep.stages import run_trial
from harness.sweep.trial import Context, Trial, read_trial, write_trial

POLL_SECONDS = 1.0
_RELAUNCHES = 2
_JOB = "job"  # conf/job.yaml


class Launching:
    """Runs trials in this process, or through a launcher of Hydra.

    Attributes:
        kind: the launcher's row in the table of launchers.
    """

    def __init__(self, kind: Launcher, launcher: HydraLauncher | None, context: Context) -> None:
        self.kind, self._hydra, self._context = kind, launcher, context
        if kind.has_queue:
            from harness.sweep.slurm_queue import watch_queue  # imports submitit, an extra

            watch_queue()

    @classmethod
    def configured(cls, master: DictConfig, hydra: HydraContext, context: Context) -> Launching:
        """Return the launching of a composed config (`hydra/launcher=...`)."""
        kind = launcher_of(str(master.hydra.launcher._target_))
        return cls(kind, None if kind.in_process else _hydra_launcher(master, hydra), context)

    @property
    def requested(self) -> dict[str, Any]:
        """The resources that the launcher requests of a cluster; empty if it requests none."""
        return getattr(self._hydra, "params", {}) or getattr(self._hydra, "resources", {})

    def run(self, trials: Sequence[Trial]) -> list[Outcome]:
        """Run trials; if vLLM answers, all are proved and trained first, and then answered for in one pass."""
        with show_progress(trials, FileCache() if self._hydra else None) as advance:
            if trials[0].config.generate.backend == "vllm":
                trained = self._run([replace(trial, splits=()) for trial in trials], advance)
                ready = [trial for trial, x in zip(trials, trained, strict=True) if x.status != "failed"]
                try:
                    self._answer(ready)
                except RuntimeError as error:
                    why = f"generate: {error}"
                    return [replace(x, status="failed", message=why) if x.status == "complete" else x for x in trained]
                answered = iter(self._run(ready, advance) if ready else [])
                return [x if x.status == "failed" else next(answered) for x in trained]
            return self._run(trials, advance)

    def _answer(self, trials: Sequence[Trial]) -> None:
        """Answer the missing splits of trained trials in one pass of vLLM.

        Raises:
            RuntimeError: if vLLM's process fails, with the end of its error output.
        """
        from harness.generate.vllm import answer_folders  # loads torch

        work = [(trial.folder, split) for trial in trials for split in _unanswered(trial)]
        if work:
            first, inputs = trials[0], self._context.inputs
            chat, splits = inputs.tokens(first.config).chat, inputs.splits(first.config)
            base = inputs.checkpoints.folder(first.config.model, first.config.results_dir)
            self._context.bases.release()  # vLLM needs the GPU's memory
            answer_folders(work, first.config, chat, splits, base=base, scratch=first.study)

    def _run(self, trials: Sequence[Trial], advance: Callable[[], bool | None]) -> list[Outcome]:
        if self._hydra is None:
            return [self._run_here(trial, advance) for trial in trials]
        processes = trials[0].config.accelerate.num_processes
        size = self.kind.batch(len(trials), self._context.machine, processes)
        return [
            outcome
            for start in range(0, len(trials), size)
            for outcome in self._run_as_jobs(trials[start : start + size], self._hydra)
        ]

    def _run_here(self, trial: Trial, advance: Callable[[], bool | None]) -> Outcome:
        self._context.slots.take(self.kind, trial.config.accelerate.num_processes)
        try:
            return run_trial(trial, self._context)
        except Exception as error:
            return _failed(trial, error)
        finally:
            advance()

    def _run_as_jobs(self, trials: Sequence[Trial], launcher: HydraLauncher) -> list[Outcome]:
        """Launch jobs; if the launcher gives up because a worker died, launch the incomplete trials again.

        A job that still runs holds its trial's lock: its second launch waits for it, and finds the trial complete.
        """
        problem = ""
        with _trial_files(trials) as paths:
            for _ in range(1 + _RELAUNCHES):
                left = [n for n, trial in enumerate(trials) if _is_left(trial, self._context.files)]
                jobs = [[f"trial={_quoted(paths[n])}"] for n in left]
                try:
                    returns: Sequence[JobReturn] = launcher.launch(jobs, initial_job_idx=0)
                except UsageError:
                    raise
                except Exception as error:  # each launcher has its own errors for a worker that died
                    problem = f"{type(error).__name__}: {one_line(str(error), 300)}"
                    continue
                ended = dict(zip(left, returns, strict=True))
                return [
                    _outcome_of(trial, ended[n]) if n in ended else _ended_before(trial, problem, self._context.files)
                    for n, trial in enumerate(trials)
                ]
        return [_ended_before(trial, problem, self._context.files) for trial in trials]


def _unanswered(trial: Trial) -> list[str]:
    """Return the splits that a trained trial (or the base) has neither scored nor answered."""
    manifest = read_manifest(trial.folder)
    has_policy = "train" in manifest.get("done", []) and manifest["status"] != "diverged"
    if not has_policy and trial.is_trained:
        return []
    done = done_stages(trial.folder, manifest)
    return [split for split in trial.splits if split not in done and not answers_path(trial.folder, split).is_file()]


def _hydra_launcher(master: DictConfig, hydra: HydraContext) -> HydraLauncher:
    """Make the configured launcher; its jobs are composed from conf/job.yaml and run `run_job`."""
    launcher: HydraLauncher = instantiate(master.hydra.launcher)
    config = master.copy()
    with open_dict(config):
        config.hydra.job.config_name = _JOB
    launcher.setup(hydra_context=hydra, task_function=run_job, config=config)
    HydraConfig.instance().set_config(config)
    return launcher


def run_job(job: DictConfig) -> dict[str, Any]:
    """Run one trial in a worker process of a launcher; launchers keep what it raises."""
    prepare_process()
    try:
        trial, context = read_trial(Path(job.trial)), worker_context()
        kind = launcher_of(str(HydraConfig.get().launcher._target_))
        context.slots.take(kind, trial.config.accelerate.num_processes)
        ended = asdict(run_trial(trial, context))
        if trial.config.generate.backend == "vllm":  # the sweep starts it while this process waits for another job
            context.bases.release()
        return ended
    except Exception as error:
        if (message := redact(error)) == str(error):
            raise
        raise RuntimeError(f"{type(error).__name__}: {message}") from None


@cache
def worker_context() -> Context:
    """Return the context of a worker process, which serves one job after the other.

    The one state that a module keeps: launchers hand a worker nothing but jobs, and it must load the base once, not
    once per trial. The process of the sweep never calls this.
    """
    return Context()


@contextlib.contextmanager
def _trial_files(trials: Sequence[Trial]) -> Iterator[list[Path]]:
    """Write each trial for its worker, in a folder of this launch, and delete the folder afterwards."""
    jobs = trials[0].study.resolve() / JOBS
    jobs.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=jobs))
    try:
        paths = [folder / f"{trial.folder.name}.json" for trial in trials]
        for path, trial in zip(paths, trials, strict=True):
            write_trial(path, trial)
        yield paths
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # another launch has jobs, too
            jobs.rmdir()


def _quoted(path: Path) -> str:
    """Write a path as a quoted value of Hydra's grammar."""
    text = str(path).replace("'", "\\'")
    return f"'{text}'"


def _is_left(trial: Trial, files: FileCache) -> bool:
    """Return whether a trial is launched: it is incomplete, and has not failed by an error of its own."""
    return not trial.is_complete(files) and not own_failure(trial.folder)


def _outcome_of(trial: Trial, job: JobReturn) -> Outcome:
    """Return how a job ended; one that died before it could write failure.json has failed, too."""
    try:
        return Outcome(**job.return_value)  # raises what the job raised
    except Exception as error:
        return _failed(trial, error)


def _failed(trial: Trial, error: Exception) -> Outcome:
    return trial.outcome("failed", f"{type(error).__name__}: {error}")


def _ended_before(trial: Trial, problem: str, files: FileCache) -> Outcome:
    """Return how a trial ended in an earlier launch; without a trace it was lost with its worker."""
    if trial.is_complete(files):
        return trial.finished(files)
    if why := own_failure(trial.folder):
        return trial.outcome("failed", why, retries=not standing_failure(trial.folder))
    return trial.outcome("failed", f"worker: {problem}")


@contextlib.contextmanager
def show_progress(trials: Sequence[Trial], files: FileCache | None = None) -> Iterator[Callable[[], bool | None]]:
    """Show a bar of complete trials; yield the function that adds one to it.

    Args:
        trials: that are launched.
        files: cache of this process, if trials run in other processes: their folders are polled.
    """
    ended = threading.Event()
    with tqdm(total=len(trials), desc="trials", delay=2, unit="trial", leave=False) as bar:

        def watch() -> None:
            left = [(trial, trial.folder / "scores.jsonl") for trial in trials]
            while not ended.wait(POLL_SECONDS):
                # Of hundreds of trials only those are read that have scores and were not complete before.
                left = [(trial, path) for trial, path in left if not (path.exists() and trial.is_complete(files))]
                complete = len(trials) - len(left)
                if complete > bar.n:  # refreshing for its own sake fills a log with lines
                    bar.update(complete - bar.n)

        thread = threading.Thread(target=watch, daemon=True)
        if files is not None:
            thread.start()
        try:
            yield bar.update
        finally:
            ended.set()
            if files is not None:
                thread.join()
