"""A real Slurm of one node on loopback, started for a test and gone afterwards.

munged, slurmctld and slurmd run in the foreground with a key, a socket, ports and a state folder of their own, so that
neither a Slurm that is installed here for other ends nor what an earlier test left behind is in the way.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

_DAEMONS = ("munged", "slurmctld", "slurmd")
_SBIN = "/usr/sbin"  # where Debian has them; not in the PATH of every user
_WAIT_SECONDS = 600  # far more than any of this takes: a busy machine must not fail a test
_CONFIG = """\
ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=1
ReturnToService=2
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@dataclass(frozen=True)
class Slurm:
    """A running cluster: `environment` is what a command needs to find it."""

    folder: Path
    environment: dict[str, str]

    def run(self, *command: str) -> str:
        """Run one of Slurm's commands and return what it says; one that fails raises with its message."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, check=False, timeout=_WAIT_SECONDS
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout

    def running(self) -> list[str]:
        """Return the ids of the jobs that run, those of an array as ARRAY_TASK."""
        return self.run("squeue", "--noheader", "--array", "--states=RUNNING", "--format=%i").split()

    def job(self, job_id: str) -> dict[str, str]:
        """Return what Slurm knows of a job, also for some minutes after its end."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", job_id)))

    def holders(self, job_id: str, path: Path) -> list[int]:
        """Return the ids of a running job's processes that hold a file open; none where the job has just ended."""
        found = []
        with contextlib.suppress(RuntimeError):
            listed = self.run("scontrol", "listpids", self.job(job_id)["JobId"]).splitlines()[1:]
            for process in {int(line.split()[0]) for line in listed}:
                with contextlib.suppress(OSError):
                    if path in [descriptor.readlink() for descriptor in Path(f"/proc/{process}/fd").iterdir()]:
                        found.append(process)
        return found


def why_not() -> str | None:
    """Say why a cluster cannot be started here; None where it can."""
    path = f"{os.environ.get('PATH', '')}:{_SBIN}"
    missing = [name for name in (*_DAEMONS, "sbatch", "srun") if shutil.which(name, path=path) is None]
    if missing:
        return f"Slurm is not installed: no {', '.join(missing)} (on Debian: apt-get install slurm-wlm munge)"
    if os.geteuid():
        return "Slurm's daemons must be started as root, to run jobs"
    return None


@contextmanager
def slurm_cluster() -> Iterator[Slurm]:
    """Start a cluster, wait until its node is idle, and end all its jobs and daemons afterwards."""
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True)))
        _write_config(folder)
        environment = os.environ | {
            "PATH": f"{os.environ.get('PATH', '')}:{_SBIN}",
            "SLURM_CONF": f"{folder}/slurm.conf",
        }
        cluster = Slurm(folder, environment)
        _start(stack, cluster, *_munged(folder))
        wait_until(cluster, "munged opens its socket", (folder / "munge.socket").exists)
        _start(stack, cluster, "slurmctld", "-D", "-c", "-f", f"{folder}/slurm.conf")
        _start(stack, cluster, "slurmd", "-D", "-f", f"{folder}/slurm.conf")
        wait_until(cluster, "the node is idle", lambda: _is_idle(cluster))
        stack.callback(_end_jobs, cluster)
        yield cluster


def _write_config(folder: Path) -> None:
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(128))
    with socket.socket() as first, socket.socket() as second:  # both open: two different ports
        first.bind(("127.0.0.1", 0))
        second.bind(("127.0.0.1", 0))
        ports = {"controller_port": first.getsockname()[1], "node_port": second.getsockname()[1]}
    host = socket.gethostname().partition(".")[0]
    cores = len(os.sched_getaffinity(0))
    (folder / "slurm.conf").write_text(_CONFIG.format(host=host, folder=folder, cores=cores, **ports))


def _munged(folder: Path) -> list[str]:
    files = {"socket": "munge.socket", "key-file": "munge.key", "log-file": "munged.log"}
    files |= {"pid-file": "munged.pid", "seed-file": "munged.seed"}
    # --force: it warns, rather than stops, that anybody may write to a folder above its own (the temporary folder).
    return ["munged", "--foreground", "--force", *(f"--{option}={folder / name}" for option, name in files.items())]


def _start(stack: ExitStack, cluster: Slurm, *command: str) -> None:
    program = shutil.which(command[0], path=cluster.environment["PATH"])
    assert program is not None
    with (cluster.folder / f"{command[0]}.txt").open("w") as log:
        process = subprocess.Popen(
            [program, *command[1:]], env=cluster.environment, stdout=log, stderr=log, start_new_session=True
        )
    stack.callback(_stop, process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _is_idle(cluster: Slurm) -> bool:
    try:
        return cluster.run("sinfo", "--noheader", "--format=%T").strip() == "idle"
    except RuntimeError:  # the controller does not answer yet
        return False


def _end_jobs(cluster: Slurm) -> None:
    """Cancel what still runs: a job's processes are no children of slurmd and would outlive it."""
    cluster.run("scancel", "--user=root")
    wait_until(cluster, "all jobs have ended", lambda: not cluster.run("squeue", "--noheader").strip())


def wait_until(cluster: Slurm, what: str, holds: Callable[[], bool]) -> None:
    """Wait until something holds, or raise with what the daemons have said."""
    deadline = time.monotonic() + _WAIT_SECONDS
    while not holds():
        if time.monotonic() > deadline:
            logs = "\n".join(
                f"{path.name}: {path.read_text()[-1500:]}" for path in sorted(cluster.folder.glob("*.txt"))
            )
            raise TimeoutError(f"Slurm: not within {_WAIT_SECONDS} s: {what}\n{logs}")
        time.sleep(0.1)
