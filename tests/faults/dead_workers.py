"""Workers that die: the study's command runs through a launcher with two workers, and one is killed while it trains."""

from __future__ import annotations

import collections
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.faults.disturbed import SEALED, STUDY, Undisturbed, log_of

ROOT = Path(__file__).resolve().parents[2]
LAUNCHERS = {"joblib": ["hydra.launcher.n_jobs=2"], "submitit_local": []}


def dead_workers(study: Undisturbed, launcher: str, times: int) -> collections.Counter[str]:
    """Kill one worker in the middle of a trial; the command ends as if it had not happened, if need be started again."""
    ends: collections.Counter[str] = collections.Counter()
    for _ in range(times):
        folder = study.new("workers")
        command = _start(folder, launcher)
        try:
            kill_worker(command, folder / "results" / "faults")
            status = command.wait(600)
        finally:
            command.kill()
        if status:
            assert _start(folder, launcher).wait(600) == 0, f"{launcher}: after a dead worker\n{log_of(folder)}"
        study.is_right(folder, what=f"a worker of {launcher} died")
        ends[f"{launcher}: {'the same command again' if status else 'the command itself'} went on"] += 1
    return ends


def _start(folder: Path, launcher: str) -> subprocess.Popen[bytes]:
    overrides = [f"results_dir={folder / 'results'}", f"hydra/launcher={launcher}", *LAUNCHERS[launcher]]
    with (folder / "log.txt").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "harness.sweep", *STUDY, *overrides], cwd=ROOT, stdout=log, stderr=log
        )


def kill_worker(command: subprocess.Popen[bytes], study: Path) -> None:
    """Kill the process that holds the lock of a trial which has a checkpoint and still trains."""
    deadline = time.monotonic() + 300
    while command.poll() is None and time.monotonic() < deadline:
        for sealed in study.glob(SEALED):
            trial = sealed.parents[2]
            for worker in _descendants(command.pid):
                if (trial / "live.jsonl").is_file() and _holds(worker, trial / ".lock"):
                    os.kill(worker, signal.SIGKILL)
                    return
        time.sleep(0.002)
    raise AssertionError(f"no worker was seen in training\n{log_of(study.parents[1])}")


def _descendants(process: int) -> list[int]:
    """Return the processes that a process has started, and those that they have."""
    found = [process]
    for parent in found:
        with contextlib.suppress(OSError):
            for thread in Path(f"/proc/{parent}/task").iterdir():
                found += map(int, (thread / "children").read_text().split())
    return found[1:]


def _holds(process: int, lock: Path) -> bool:
    try:
        return any(path.readlink() == lock for path in Path(f"/proc/{process}/fd").iterdir())
    except OSError:
        return False
