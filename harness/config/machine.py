"""This machine: its GPUs and cores, the trials that it can train, and the provenance of what it computes.

Imports torch only for the hardware's names.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypedDict

import psutil

from harness.config.schema import AccelerateConfig


@dataclass(frozen=True)
class Machine:
    """The devices of a machine, as this process may use them.

    Attributes:
        gpus: CUDA's names of the visible GPUs, or of all that the driver lists.
        cores: number of CPU cores.
        gpu_bytes: memory of the smallest of the GPUs; 0 where it is not known.
        memory_bytes: of the machine, or what its container may use; 0 where it is not known.
    """

    gpus: tuple[str, ...]
    cores: int
    gpu_bytes: int = 0
    memory_bytes: int = 0

    @classmethod
    def here(cls, driver: str = "libcuda.so.1") -> Machine:
        """Look up the devices of this machine; asks the GPUs' driver in a process of its own."""
        found = driver_gpus(driver)
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = tuple(map(str, range(len(found)))) if visible is None else _names(visible)
        return cls(names, len(os.sched_getaffinity(0)), min(found, default=0) if names else 0, usable_memory())

    def workers(self, processes: int = 1) -> int:
        """Return how many trials with `processes` processes each run beside each other: one GPU or core per process."""
        return max(1, (len(self.gpus) or self.cores) // processes)


def _names(visible: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in visible.split(",") if name.strip() and name.strip() != "-1")


# Asked by CUDA's driver, as torch does: a container may lack nvidia-smi. In a process of its own, since the first
# question settles which GPUs a process sees.
_ASK_DRIVER = """
import ctypes, sys
cuda = ctypes.CDLL(sys.argv[1])
count, device, size = ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t()
assert cuda.cuInit(0) == 0 and cuda.cuDeviceGetCount(ctypes.byref(count)) == 0
for number in range(count.value):
    assert cuda.cuDeviceGet(ctypes.byref(device), number) == 0
    assert cuda.cuDeviceTotalMem_v2(ctypes.byref(size), device) == 0
    print(size.value)
"""


def driver_gpus(library: str) -> list[int]:
    """Return the memory in bytes of each GPU that CUDA's driver lists, in its order; empty without a driver."""
    try:
        ctypes.CDLL(library)  # loads it and asks nothing
        listed = subprocess.run(
            [sys.executable, "-S", "-c", _ASK_DRIVER, library], capture_output=True, text=True, check=True, timeout=60
        )
        return [int(size) for size in listed.stdout.split()]
    except (OSError, ValueError, subprocess.SubprocessError):
        return []


_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def usable_memory(limits: Sequence[str] = _CGROUP_LIMITS) -> int:
    """Return the memory of the machine, or the container's limit where that is less."""
    found = [int(psutil.virtual_memory().total)]
    for path in limits:
        with contextlib.suppress(OSError, ValueError):  # no such limit; the word max
            found.append(int(Path(path).read_text()))
    return min(found)


def has_gpu() -> bool:
    """Return True where torch can use a CUDA device."""
    import torch

    return bool(torch.cuda.is_available())


def processes_problem(accelerate: AccelerateConfig, machine: Machine) -> str:
    """Say why a trial cannot be trained with these processes on a machine; empty where it can."""
    kind, count, found = accelerate.distributed_type, accelerate.num_processes, len(machine.gpus)
    if found and count > found:
        return f"accelerate.num_processes={count}: this machine has {found} GPUs; give at most as many"
    if kind in ("FSDP", "DEEPSPEED") and not found:
        return (
            f"accelerate.distributed_type={kind}: needs GPUs, and there are none here (accelerate would silently "
            "run DDP); use accelerate=ddp on CPUs"
        )
    if kind == "DEEPSPEED" and importlib.util.find_spec("deepspeed") is None:
        return "accelerate.distributed_type=DEEPSPEED: DeepSpeed is not installed; pip install deepspeed"
    return ""


# Launcher settings that request GPUs: submitit's keys, Slurm's own, Ray's.
_GPU_SETTINGS = ("gpus_per_node", "gpus_per_task", "gres", "gpus", "gpus-per-node", "gpus-per-task", "num_gpus")
_GPU_COUNT = re.compile(r"(?:[^\W\d][\w.-]*:)?(\d+)$")  # 2, a100:2
_GPU_COUNT_IN_GRES = re.compile(r"(?:^|,)gpu(?::[^\W\d][\w.-]*)?:(\d+)")  # gpu:2 or gpu:a100:2, among other resources


def job_problem(requested: Mapping[str, Any], accelerate: AccelerateConfig) -> str:
    """Say why the requested cluster jobs cannot train trials; empty where they can.

    Args:
        requested: the launcher's settings; empty for launchers that request nothing.
        accelerate: a trial's processes.
    """
    for key in ("nodes", "tasks_per_node"):
        if requested.get(key) not in (None, 1):
            return (
                f"hydra.launcher.{key}={requested[key]}: a trial is one task, whose processes accelerate starts; give 1"
            )
    kind, count = accelerate.distributed_type, accelerate.num_processes
    given = {
        **(requested.get("additional_parameters") or {}),
        **{key: requested[key] for key in requested if requested[key] is not None},
    }
    wanted = {key: given[key] for key in _GPU_SETTINGS if key in given}
    for key, value in wanted.items():
        found = _GPU_COUNT_IN_GRES.search(str(value)) if key == "gres" else _GPU_COUNT.match(str(value))
        number = float(value if isinstance(value, int | float) else found[1] if found else 0)
        if 0 < number < count:
            return f"hydra.launcher.{key}={value}: accelerate.num_processes={count} takes a GPU each; give {count}"
    if (
        "partition" in requested
        and kind in ("FSDP", "DEEPSPEED")
        and all(str(value) == "0" for value in wanted.values())
    ):
        return f"hydra.launcher.gpus_per_node: accelerate.distributed_type={kind} needs GPUs; give {count}"
    return ""


class Provenance(TypedDict):
    """Versions by package, the commit (None outside a checkout), and the hardware of a process."""

    versions: dict[str, str]
    commit: str | None
    hardware: dict[str, int | str | None]


_PACKAGES = [
    *("dpo-simpo-harness", "torch", "transformers", "trl", "peft", "datasets", "accelerate", "safetensors"),
    *("hydra-core", "wandb", "numpy", "scipy", "pandas"),
]


def provenance() -> Provenance:
    """Return versions, commit and hardware of this process; takes 0.1 s and imports torch."""
    return {"versions": _package_versions(), "commit": _git_commit(), "hardware": _hardware_of_process()}


def _package_versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _git_commit() -> str | None:
    """Return the commit of this package's checkout, with `+changes` where files differ from it."""
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


def _hardware_of_process() -> dict[str, int | str | None]:
    import torch

    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "device": ", ".join(names) or "cpu",
        "threads": torch.get_num_threads(),
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
