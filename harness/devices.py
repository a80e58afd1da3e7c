"""Which GPU or share of the cores a worker gets where several work on one machine. Imports no torch."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import tempfile
import time
from functools import lru_cache
from pathlib import Path
from typing import TextIO

_POLL_SECONDS = 0.5
_held: list[TextIO] = []


def workers_here() -> int:
    """Return how many trials run beside each other on this machine: one a GPU, or one a core where there is none."""
    return len(gpus()) or len(os.sched_getaffinity(0))


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


def take_place(launcher: str) -> str | None:
    """Take a GPU, or a core, where a launcher runs several trials on this machine; keep it until the process ends.

    Must run before torch is imported. A place is a lock on a file, which the kernel frees however the process ends.
    Slurm and Ray hand out places of their own; joblib bounds its workers and their threads itself, so that only GPUs
    are left to hand out; submitit's local workers are all started at once, and wait here for their turn.

    Args:
        launcher: name of the launcher's class.

    Returns:
        The name of the place; None where none is to be taken.
    """
    waits = launcher == "LocalLauncher"
    if _held or not (waits or (launcher == "JoblibLauncher" and len(gpus()) > 1)):
        return None
    names = gpus() or tuple(f"core-{number}" for number in range(workers_here()))
    place = _wait_for_one_of(names)
    if gpus():
        os.environ["CUDA_VISIBLE_DEVICES"] = place
    else:
        os.environ["OMP_NUM_THREADS"] = "1"
    return place


def _wait_for_one_of(names: tuple[str, ...]) -> str:
    folder = Path(tempfile.gettempdir()) / f"harness-places-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    while True:
        for name in names:
            file = (folder / name.replace("/", "_")).open("w")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                file.close()
                continue
            _held.append(file)
            return name
        time.sleep(_POLL_SECONDS)
