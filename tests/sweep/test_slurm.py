"""The launcher `submitit_slurm` on a real Slurm: the scores of one process, also where jobs are requeued and cancelled."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import SMALL, overriding
from tests.servers import command
from tests.servers.slurm import Slurm, slurm_cluster, wait_until, why_not

ROOT = Path(__file__).resolve().parents[2]
# The base, and one trial an arm, whose training takes some seconds with a checkpoint a step: time to hit it.
STUDY = overriding(
    SMALL,
    "+method=simpo,dpo",
    "study=s",
    "seed=1",
    "data.max_train_pairs=64",
    "train.epochs=2",
    "train.batch_size=2",
    "train.micro_batch_size=2",
)
THROUGH_SLURM = ["hydra/launcher=submitit_slurm", "hydra.launcher.timeout_min=60"]
BEGINS_TO_TRAIN = "INFO harness.trial: train\n"  # in a trial's log.txt


def start(results: Path, *more: str, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "harness.sweep", *STUDY, f"results_dir={results}", *more],
        cwd=ROOT,
        env=environment or dict(os.environ),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(sweep: subprocess.Popen[str]) -> None:
    try:
        output, _ = sweep.communicate(timeout=3600)
    finally:
        sweep.kill()
    assert sweep.returncode == 0, output[-5000:]


@pytest.fixture(scope="module")
def in_one_process(tmp_path_factory) -> Path:
    if (reason := why_not()) is not None:  # before a study is run for nothing
        pytest.skip(reason)
    results = tmp_path_factory.mktemp("basic") / "results"
    done = command.run("harness.sweep", *STUDY, f"results_dir={results}")
    assert done.returncode == 0, done.stdout + done.stderr
    return results / "s"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Slurm]:
    with slurm_cluster() as found:
        yield found


def hit(cluster: Slurm, study: Path, sweep: subprocess.Popen[str], *order: str) -> tuple[str, Path]:
    """Give one of Slurm's commands a job that has written a checkpoint and still trains; return job and trial."""
    deadline = time.monotonic() + 1800
    while time.monotonic() < deadline and sweep.poll() is None:
        for job_id in cluster.running():
            for live in study.glob("trials/*/live.jsonl"):
                processes = cluster.holders(job_id, live.parent / ".lock")
                if processes and any(live.parent.glob("checkpoints/checkpoint-*")):
                    cluster.run(*order, job_id)
                    # Slurm's own SIGKILL follows its SIGTERM after five seconds or more, when so small a trial is done.
                    for process in processes:
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(process, signal.SIGKILL)
                    return job_id, live.parent
        time.sleep(0.05)
    ended = sweep.stdout.read()[-3000:] if sweep.poll() is not None else f"jobs that run: {cluster.running()}"
    pytest.fail(f"no job was seen in training, and none could be disturbed\n{ended}")


def disturb(cluster: Slurm, study: Path, sweep: subprocess.Popen[str]) -> list[Path]:
    """Requeue one job in the middle of its training and cancel another; return their trials' folders."""
    requeued, first = hit(cluster, study, sweep, "scontrol", "requeue")
    cancelled, second = hit(cluster, study, sweep, "scancel")
    wait_until(cluster, "the cancelled job has ended", lambda: cluster.job(cancelled)["JobState"] == "CANCELLED")
    wait_until(cluster, "the requeued job waits", lambda: cluster.job(requeued)["JobState"] == "PENDING")
    assert cluster.job(requeued)["Restarts"] == "1"
    cluster.run("scontrol", "update", f"JobId={requeued}", "StartTime=now")  # Slurm would let it wait two minutes
    return [first, second]


@pytest.mark.slow
def test_jobs_of_a_real_slurm_one_requeued_and_one_cancelled_give_the_scores_of_one_process(
    cluster: Slurm, in_one_process: Path, tmp_path: Path
) -> None:
    """The base's job is left alone; the job of each arm is hit in its training."""
    study = tmp_path / "results" / "s"
    sweep = start(study.parent, *THROUGH_SLURM, "train.checkpoint_steps=1", environment=cluster.environment)
    try:
        disturbed = disturb(cluster, study, sweep)
    except BaseException:
        sweep.kill()
        raise
    finish(sweep)
    assert (study / "scores.csv").read_bytes() == (in_one_process / "scores.csv").read_bytes()
    begun = {trial.name: (trial / "log.txt").read_text().count(BEGINS_TO_TRAIN) for trial in disturbed}
    assert list(begun.values()) == [2, 2], f"a job was not hit in its training, so nothing was tested: {begun}"
