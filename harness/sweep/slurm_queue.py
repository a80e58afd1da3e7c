"""Ask Slurm's queue how jobs are, where the cluster keeps no accounts. Knows submitit.

submitit asks `sacct` alone. Without accounting that always fails, and a job that was cancelled, or whose node was lost,
would be waited for forever.
"""

from __future__ import annotations

import contextlib
import os
import subprocess

from submitit.slurm.slurm import SlurmInfoWatcher, SlurmJob

_SECONDS = 15  # at most so long between two questions: any user may ask for the queue, and the answer is short


class QueueWatcher(SlurmInfoWatcher):
    """Knows of each job whether it is in the queue; one that is not has ended, with a result or without."""

    def _make_command(self) -> list[str] | None:
        return ["squeue", "--noheader", "--array", f"--user={os.getuid()}", "--format=%i"]

    def read_info(self, string: bytes | str) -> dict[str, dict[str, str]]:
        """Read what squeue says: the ids of jobs that wait, run or are being ended."""
        queued = set((string if isinstance(string, str) else string.decode()).split())
        return {job: {"State": "RUNNING" if job in queued else "NOT IN THE QUEUE"} for job in self._registered}


def watch_queue() -> None:
    """Let submitit ask the queue from now on, unless this cluster's accounts can be read."""
    with contextlib.suppress(OSError):
        if subprocess.run(["sacct", "--noheader", "--jobs=1"], capture_output=True, check=False).returncode == 0:
            return
    SlurmJob.watcher = QueueWatcher(delay_s=_SECONDS)
