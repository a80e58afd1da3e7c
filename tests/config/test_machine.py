"""The devices of a machine: GPUs by CUDA's own driver, since a container may lack nvidia-smi; memory as a container has it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from harness.config.machine import Machine, driver_gpus, usable_memory

# What CUDA's driver answers, with two GPUs of 80 and 40 GB; no GPU is here.
DRIVER = """
#include <stddef.h>
int cuInit(unsigned flags) { return 0; }
int cuDeviceGetCount(int *count) { *count = 2; return 0; }
int cuDeviceGet(int *device, int number) { *device = number; return 0; }
int cuDeviceTotalMem_v2(size_t *size, int device) { *size = device ? 40000000000UL : 80000000000UL; return 0; }
"""


@pytest.fixture
def driver(tmp_path: Path) -> str:
    if shutil.which("gcc") is None:
        pytest.skip("there is no C compiler: the question to CUDA's driver is not tested")
    (tmp_path / "driver.c").write_text(DRIVER)
    library = str(tmp_path / "libcuda.so.1")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, tmp_path / "driver.c"], check=True)
    return library


def test_gpus_are_found_without_nvidia_smi(driver: str) -> None:
    assert driver_gpus(driver) == [80 * 10**9, 40 * 10**9]


def test_without_a_driver_and_with_a_broken_one_there_are_no_gpus(tmp_path: Path) -> None:
    assert driver_gpus("libcuda-that-is-not-there.so.1") == []
    broken = tmp_path / "broken.so"
    broken.write_text("no library")
    assert driver_gpus(str(broken)) == []


@pytest.mark.parametrize(
    ("visible", "names", "size"),
    [(None, ("0", "1"), 40), ("1, GPU-8f", ("1", "GPU-8f"), 40), ("", (), 0), ("-1", (), 0)],
)
def test_visible_gpus_have_cudas_names_and_the_memory_of_the_smallest(
    visible: str | None, names: tuple[str, ...], size: int, driver: str, monkeypatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = Machine.here(driver)
    assert (found.gpus, found.gpu_bytes) == (names, size * 10**9)
    assert found.workers() == (len(names) or found.cores), "one trial per GPU, and not one per core on one card"


def test_a_containers_limit_of_memory_counts(tmp_path: Path) -> None:
    whole = usable_memory([])
    (tmp_path / "max").write_text("max\n")
    (tmp_path / "limit").write_text("1000000\n")
    assert usable_memory([str(tmp_path / "max"), str(tmp_path / "none")]) == whole
    assert usable_memory([str(tmp_path / "limit")]) == 1_000_000
