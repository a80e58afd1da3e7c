"""Seconds and peak memory of each stage of a trial, in the process that does the work."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path


class Meter:
    """Collect seconds and peak memory by stage.

    On a CPU, memory is the peak of the process's resident set during the stage (Linux: the high-water mark is reset at
    the stage's start; elsewhere only the peak since the process's start is known). On a GPU it is the peak of what
    torch allocated there.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.peak_memory_bytes: dict[str, int] = {}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure what runs inside; a stage entered twice adds its seconds and keeps the larger peak."""
        reset_peak_memory()
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start
            self.peak_memory_bytes[name] = max(self.peak_memory_bytes.get(name, 0), peak_memory_bytes())


def settle_imports() -> None:
    """Take what has been imported so far out of the collector's rounds; again where more was imported since.

    With torch, transformers and TRL loaded, a full collection looks at a million objects for a quarter of a second. The
    first trial of a process is the SFT base, which needs neither the trainers nor what they import while they run.
    """
    _settle(len(sys.modules))


@functools.cache
def _settle(num_modules: int) -> None:
    """Freeze once for each number of loaded modules."""
    gc.freeze()


def reset_peak_memory() -> None:
    """Give freed memory back to the system and start the high-water mark anew."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError, AttributeError):  # not Linux, or not glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # 5: reset the peak resident set size, see proc(5)


def peak_memory_bytes() -> int:
    """Return the peak since the last reset."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
