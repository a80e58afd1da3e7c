"""How trials get their devices: a Hydra launcher for Ray, and slots (GPUs or cores) on this machine.

The Ray launcher is our own: the published plugin (hydra-ray-launcher 1.2.2) needs cloudpickle below 3, joblib
needs 3 or above, and a worker that dies there ends the whole sweep.
"""

from __future__ import annotations

import fcntl
import logging
import os
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from hydra.plugins.launcher import Launcher as HydraLauncher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from harness.config.launchers import Launcher
from harness.config.machine import Machine
from harness.study.errors import UsageError


class RayLauncher(HydraLauncher):
    """Run trials as Ray tasks.

    Args:
        address: of a cluster (`auto`, `ray://HOST:10001`); null starts Ray on this machine.
        num_cpus, num_gpus: what a trial reserves; null: one for each of its processes (GPUs where the cluster has any).
            Ray hands its GPUs out by CUDA_VISIBLE_DEVICES.
        max_retries: how often a trial whose worker died is started again; it goes on from its last checkpoint.
        init: further arguments of `ray.init`.
    """

    def __init__(
        self,
        address: str | None,
        num_cpus: float | None,
        num_gpus: float | None,
        max_retries: int,
        init: dict[str, Any] | None = None,
    ) -> None:
        self.address, self.resources = address, {"num_cpus": num_cpus, "num_gpus": num_gpus}
        self.max_retries, self.init = max_retries, dict(init or {})

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what a job needs."""
        self.context, self.task, self.config = hydra_context, task_function, config

    def _resources(self, ray: ModuleType) -> dict[str, float]:
        processes = int(self.config.accelerate.num_processes)
        has_gpus = ray.cluster_resources().get("GPU", 0) > 0
        usual = {"num_cpus": processes, "num_gpus": processes if has_gpus else 0}
        return {name: usual[name] if given is None else given for name, given in self.resources.items()}

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs; one that fails, or whose worker dies too often, is a failed job and stops no other."""
        try:
            import ray
        except ImportError as error:
            raise UsageError(
                "hydra/launcher=ray needs Ray; install it: pip install 'dpo-simpo-harness[ray]'"
            ) from error
        if not ray.is_initialized():
            quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
            local = {"include_dashboard": False} if self.address is None else {}
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's own 15 starves trials on a machine that is busy
            os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
            try:
                # Not None, with which Ray waits for the last cluster that was here, though it may have ended.
                ray.init(address=self.address or "local", **{**quiet, **local, **self.init})
            except ConnectionError as error:
                raise UsageError(
                    f"hydra.launcher.address={self.address}: {error}; is the cluster there, and where it asks for a "
                    "token: are RAY_AUTH_MODE=token and the token set?"
                ) from error
        remote = ray.remote(_execute).options(**self._resources(ray), max_retries=self.max_retries)
        about = (self.context, self.config, self.task, Singleton.get_state(), str(Path.cwd()))
        shared = [ray.put(part) for part in about]
        running = [
            remote.remote(initial_job_idx + number, list(overrides), *shared)
            for number, overrides in enumerate(job_overrides)
        ]
        return [_result(ray, job) for job in running]


def _execute(
    number: int,
    overrides: list[str],
    context: HydraContext,
    config: DictConfig,
    task: TaskFunction,
    state: dict[type, Singleton],
    folder: str,
) -> JobReturn:
    """Run one Hydra job in a Ray worker, in the folder of the sweep: paths may be relative to it."""
    os.chdir(folder)
    setup_globals()
    Singleton.set_state(state)
    composed = context.config_loader.load_sweep_config(config, overrides)
    with open_dict(composed):
        composed.hydra.job.id, composed.hydra.job.num = f"{composed.hydra.job.name}_{number}", number
    HydraConfig.instance().set_config(composed)
    return run_job(
        hydra_context=context,
        config=composed,
        task_function=task,
        job_dir_key="hydra.sweep.dir",
        job_subdir_key="hydra.sweep.subdir",
    )


def _result(ray: ModuleType, job: object) -> JobReturn:
    try:
        return ray.get(job)
    except Exception as error:  # the worker died, or could not be started
        failed = JobReturn(status=JobStatus.FAILED)
        failed.return_value = error
        return failed


_POLL_SECONDS = 0.5


class Slots:
    """The GPUs or cores that this process holds, each by a lock on a file that the kernel frees with the process."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._held: list[TextIO] = []
        self._environment: dict[str, str | None] = {}

    def take(self, launcher: Launcher, count: int = 1) -> list[str]:
        """Take GPUs or cores for a trial if several trials may run on this machine; keep them for later trials.

        Must run before CUDA is initialised. Slurm and Ray hand out devices of their own; at most `count` are used. On
        CPUs only submitit's local workers, all started at once, wait for a slot: joblib bounds its workers itself.

        Args:
            launcher: the launcher that runs the trial.
            count: devices per trial.

        Returns:
            The names of the slots; empty if none are needed.
        """
        gpus = self._machine.gpus
        if launcher.is_elsewhere:
            if len(gpus) > count:  # more than requested: one process would spread over all of them
                self._set("CUDA_VISIBLE_DEVICES", ",".join(gpus[:count]))
            return []
        if self._held or not (launcher.one_process_each or len(gpus) > 1):
            return []
        names = gpus or tuple(f"core-{number}" for number in range(self._machine.cores))
        slots = self._wait_for(names, min(count, len(names)))
        if gpus:
            self._set("CUDA_VISIBLE_DEVICES", ",".join(slots))
        elif count == 1:
            self._set("OMP_NUM_THREADS", "1")
        return slots

    def release(self) -> None:
        """Give all slots back, and the environment as it was: the next study of this process starts from it."""
        while self._held:
            self._held.pop().close()
        for name, value in self._environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        self._environment.clear()

    def _set(self, name: str, value: str) -> None:
        self._environment.setdefault(name, os.environ.get(name))
        os.environ[name] = value

    def _wait_for(self, names: tuple[str, ...], count: int) -> list[str]:
        """Lock all `count` slots or none, so that two trials cannot deadlock with half each."""
        folder = Path(tempfile.gettempdir()) / f"harness-places-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        while True:
            taken: dict[str, TextIO] = {}
            for name in names:
                file: TextIO = (folder / name.replace("/", "_")).open("w")
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    file.close()
                    continue
                taken[name] = file
                if len(taken) == count:
                    self._held.extend(taken.values())
                    return list(taken)
            for file in taken.values():
                file.close()
            time.sleep(_POLL_SECONDS * random.uniform(0.5, 1.5))  # two waiting processes must not keep step
