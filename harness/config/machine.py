"""Which GPU or share of the cores a worker gets where several work on one machine. Imports no torch."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from harness.config.schema import AccelerateConfig
from harness.study.manifest import Provenance


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


_PACKAGES = [
    *("dpo-simpo-harness", "torch", "transformers", "trl", "peft", "datasets", "accelerate", "safetensors"),
    *("hydra-core", "wandb", "numpy", "scipy", "pandas"),
]


@lru_cache
def provenance() -> Provenance:
    """Return `versions`, `commit` (None outside a checkout) and `hardware` of this process."""
    return {"versions": _versions(), "commit": _commit(), "hardware": _hardware()}


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    """Return the commit of the checkout that this package is in, with `+changes` where files differ from it."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return None
    try:
        commit = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
        changes = subprocess.run(
            ["git", "-C", str(here), "status", "--porcelain"], capture_output=True, text=True, check=True, timeout=10
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+changes" if changes.strip() else "")


def _hardware() -> dict[str, Any]:
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "device": ", ".join(gpus) or "cpu",
        "threads": torch.get_num_threads(),
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def has_gpu() -> bool:
    """Return True where torch can use a CUDA device."""
    import torch

    return bool(torch.cuda.is_available())
