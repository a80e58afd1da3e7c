"""Which GPU or share of the cores a worker gets where several work on one machine. Imports no torch."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import random
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, TextIO

from harness.schema import AccelerateConfig

_POLL_SECONDS = 0.5
_held: list[TextIO] = []


def workers_here(processes: int = 1) -> int:
    """Return how many trials of so many processes run beside each other on this machine.

    A process takes a GPU, or a core where there is none.
    """
    return max(1, (len(gpus()) or len(os.sched_getaffinity(0))) // processes)


def processes_problem(accelerate: AccelerateConfig) -> str:
    """Say why a trial cannot be trained with these processes on this machine; empty where it can."""
    kind, count = accelerate.distributed_type, accelerate.num_processes
    if gpus() and count > len(gpus()):
        return f"accelerate.num_processes={count}: this machine has {len(gpus())} GPUs; give at most as many"
    if kind in ("FSDP", "DEEPSPEED") and not gpus():
        return (
            f"accelerate.distributed_type={kind}: needs GPUs, and there are none here (accelerate would silently "
            "run DDP); use accelerate=ddp on CPUs"
        )
    if kind == "DEEPSPEED" and importlib.util.find_spec("deepspeed") is None:
        return "accelerate.distributed_type=DEEPSPEED: DeepSpeed is not installed; pip install deepspeed"
    return ""


# What launchers ask a cluster for GPUs with: submitit's keys, Slurm's own ones, Ray's.
_GPU_KEYS = ("gpus_per_node", "gpus_per_task", "gres", "gpus", "gpus-per-node", "gpus-per-task", "num_gpus")
_COUNT = re.compile(r"(?:[^\W\d][\w.-]*:)?(\d+)$")  # 2, a100:2
_OF_GRES = re.compile(r"(?:^|,)gpu(?::[^\W\d][\w.-]*)?:(\d+)")  # gpu:2 or gpu:a100:2, among other resources


def job_problem(asked: Mapping[str, Any], accelerate: AccelerateConfig) -> str:
    """Say why jobs on a cluster, as they are asked for, cannot train trials; empty where they can.

    Args:
        asked: the launcher's settings; empty for launchers that ask for nothing.
        accelerate: a trial's processes.
    """
    for key in ("nodes", "tasks_per_node"):
        if asked.get(key) not in (None, 1):
            return f"hydra.launcher.{key}={asked[key]}: a trial is one task, whose processes accelerate starts; give 1"
    kind, count = accelerate.distributed_type, accelerate.num_processes
    given = {
        **(asked.get("additional_parameters") or {}),
        **{key: asked[key] for key in asked if asked[key] is not None},
    }
    wanted = {key: given[key] for key in _GPU_KEYS if key in given}
    for key, value in wanted.items():
        found = _OF_GRES.search(str(value)) if key == "gres" else _COUNT.match(str(value))
        number = float(value if isinstance(value, int | float) else found[1] if found else 0)
        if 0 < number < count:
            return f"hydra.launcher.{key}={value}: accelerate.num_processes={count} takes a GPU each; give {count}"
    if "partition" in asked and kind in ("FSDP", "DEEPSPEED") and all(str(value) == "0" for value in wanted.values()):
        return f"hydra.launcher.gpus_per_node: accelerate.distributed_type={kind} needs GPUs; give {count}"
    return ""


@lru_cache
def gpus() -> tuple[str, ...]:
    """Return CUDA's names of this machine's GPUs: of those that are visible, or of all that nvidia-smi lists."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return tuple(name.strip() for name in visible.split(",") if name.strip() and name.strip() != "-1")
    if shutil.which("nvidia-smi") is None:
        return ()
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        listed = subprocess.run(
            ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"],
            capture_output=True, text=True, check=True, timeout=30,
        )  # fmt: skip
        return tuple(listed.stdout.split())
    return ()


def take_places(launcher: str, count: int = 1) -> list[str]:
    """Take GPUs, or cores, for a trial where several may run on this machine; keep them until the process ends.

    Must run before CUDA is initialised. A place is a lock on a file, which the kernel frees however the process ends.
    Slurm and Ray hand out places of their own, of which at most `count` are used. On CPUs only submitit's local
    workers, all started at once, wait for their turn: joblib bounds its workers and their threads itself.

    Args:
        launcher: name of the launcher's class.
        count: how many a trial needs.

    Returns:
        The names of the places; empty where none are to be taken.
    """
    if launcher in ("SlurmLauncher", "RayLauncher"):
        if len(gpus()) > count:  # more than asked for: one process would spread over all of them
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus()[:count])
        return []
    if _held or not (launcher == "LocalLauncher" or len(gpus()) > 1):
        return []
    names = gpus() or tuple(f"core-{number}" for number in range(len(os.sched_getaffinity(0))))
    places = _wait_for(names, min(count, len(names)))
    if gpus():
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(places)
    elif count == 1:
        os.environ["OMP_NUM_THREADS"] = "1"
    return places


def _wait_for(names: tuple[str, ...], count: int) -> list[str]:
    """Lock `count` of the places; while there are too few, none is kept, so that nobody waits for a half."""
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
                _held.extend(taken.values())
                return list(taken)
        for file in taken.values():
            file.close()
        time.sleep(_POLL_SECONDS * random.uniform(0.5, 1.5))  # two that wait for the same places must not keep step
