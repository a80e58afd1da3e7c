"""Launchers: the same study through each of them gives the same scores, and a worker that dies is launched again."""

from __future__ import annotations

import itertools
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from harness.config import machine as devices
from harness.config.launchers import LAUNCHERS
from harness.config.overrides import check_overrides
from harness.config.schema import AccelerateConfig
from harness.study.errors import UsageError
from harness.sweep.app import run_sweep
from harness.sweep.design import single_trial
from harness.sweep.launch import Launching
from harness.sweep.launchers import RayLauncher
from harness.sweep.problems import compose_run
from harness.sweep.trial import Context
from tests.conftest import SMALL, overriding
from tests.servers import command

ROOT = Path(__file__).resolve().parents[2]
# Few trials, since some launchers start a process for each: two that tune DPO, and one per arm that confirms.
STUDY = [
    *(*SMALL, "+method=simpo,dpo", "study=s", "arms.dpo.beta=0.05,0.1", "allow_unequal_budgets=true"),
    *("tuning_seeds=[7]", "seed=1"),
]


def sweep(results: Path, *more: str) -> subprocess.CompletedProcess:
    return command.run("harness.sweep", *STUDY, f"results_dir={results}", *more)


def ran_beside_each_other(study: Path) -> bool:
    """Whether a trial's log begins before that of an earlier one ends."""
    logs = [re.findall(r"^[-0-9]{10} [:,0-9]{12}", path.read_text(), re.M) for path in study.glob("trials/*/log.txt")]
    times = sorted((lines[0], lines[-1]) for lines in logs)
    return any(begun < ended for (_, ended), (begun, _) in itertools.pairwise(times))


@pytest.fixture(scope="module")
def in_one_process(tmp_path_factory) -> str:
    results = tmp_path_factory.mktemp("basic") / "results"
    run_sweep([*STUDY, f"results_dir={results}"])
    assert not ran_beside_each_other(results / "s")
    return (results / "s" / "scores.csv").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local", "ray"])
def test_tuning_selection_and_confirmation_give_the_same_scores_through(
    launcher: str, in_one_process: str, tmp_path: Path
) -> None:
    done = sweep(tmp_path / "results", f"hydra/launcher={launcher}")
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    assert (tmp_path / "results" / "s" / "scores.csv").read_text() == in_one_process
    assert ran_beside_each_other(tmp_path / "results" / "s")


@pytest.fixture
def ray_cluster(tmp_path: Path):
    """A real cluster of one node, as `ray start --head` makes it, that asks for a token."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        (tmp_path / "token").write_text("0123456789abcdef" * 4)
        start = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", f"--port={port}"]
        start += ["--num-cpus=2", "--num-gpus=0", "--include-dashboard=false", "--disable-usage-stats"]
        head = subprocess.Popen(start, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path)
        try:
            said = next((line for line in head.stdout if "block forever" in line), "")
            assert said, "the cluster did not start"
            yield f"127.0.0.1:{port}", head
        finally:
            head.terminate()  # it ends all that it started
            head.wait(600)
            head.stdout.close()


@pytest.mark.slow
def test_the_same_scores_come_from_a_ray_cluster_that_is_there_already(
    ray_cluster, in_one_process: str, tmp_path: Path, monkeypatch
) -> None:
    address, head = ray_cluster
    given = ["hydra/launcher=ray", f"hydra.launcher.address={address}"]
    done = sweep(tmp_path / "results", *given)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    assert (tmp_path / "results" / "s" / "scores.csv").read_text() == in_one_process
    assert head.poll() is None, "the cluster outlives the sweep"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    refused = sweep(tmp_path / "other", *given)
    assert refused.returncode == 2
    assert f"hydra.launcher.address={address}: " in refused.stderr
    assert "RAY_AUTH_MODE=token" in refused.stderr


def test_ray_on_this_machine_does_not_wait_for_the_last_cluster_that_was_here(monkeypatch) -> None:
    """Regression: with no address Ray joins the cluster that a file of its own names, though it may have ended."""
    asked = {}

    def init(**given) -> None:
        asked.update(given)
        raise ConnectionError("enough")

    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", init)
    launcher = RayLauncher(address=None, num_cpus=None, num_gpus=None, max_retries=0)
    with pytest.raises(UsageError, match="enough"):
        launcher.launch([["seed=1"]], 0)
    assert asked["address"] == "local"


def test_a_launcher_that_is_not_known_or_not_installed_is_refused_with_what_to_do(monkeypatch) -> None:
    with pytest.raises(UsageError, match=r"no such launcher; known: .*joblib.*ray.*submitit_slurm"):
        check_overrides(["+method=simpo,dpo", "hydra/launcher=slurm"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'dpo-simpo-harness\[ray\]'"):
        check_overrides(["+method=simpo,dpo", "hydra/launcher=ray"])


# Workers that die


class Dies:
    """A launcher whose worker dies the first `times`, as loky's and submitit's do: with an exception for the sweep."""

    def __init__(self, times: int) -> None:
        self.left, self.launched = times, 0

    def launch(self, jobs, initial_job_idx):
        self.launched += 1
        if self.left:
            self.left -= 1
            raise RuntimeError("A worker process managed by the executor was unexpectedly terminated")
        outcome = {"trial_id": "t", "arm": "dpo", "config": "c", "seed": 0, "status": "complete"}
        return [SimpleNamespace(return_value=outcome) for _ in jobs]


def outcomes(launcher: Dies, tmp_path: Path) -> list:
    trial = compose_run([*SMALL, f"results_dir={tmp_path}", "+method=dpo", "seed=0"])
    return Launching(LAUNCHERS["joblib"], launcher, Context()).run([single_trial(replace(trial, study="s"))])


JOBS = {
    "two tasks": (["hydra.launcher.tasks_per_node=2"], "hydra.launcher.tasks_per_node=2: a trial is one task"),
    "two nodes": (["hydra.launcher.nodes=2"], "hydra.launcher.nodes=2: a trial is one task"),
    "too few GPUs": (["accelerate=ddp", "hydra.launcher.gpus_per_node=1"], "num_processes=2 takes a GPU each; give 2"),
    "no GPUs": (["accelerate=fsdp"], "gpus_per_node: accelerate.distributed_type=FSDP needs GPUs; give 2"),
}


def test_gpus_are_counted_however_a_cluster_is_asked_for_them() -> None:
    two = AccelerateConfig(distributed_type="MULTI_GPU", num_processes=2)
    for few in (
        {"gpus_per_node": "a100:1"},
        {"gres": "gpu:1"},
        {"gres": "tmpdir:9,gpu:h100:1"},
        {"gpus_per_task": 1},
        {"additional_parameters": {"gpus": 1}},
        {"num_gpus": 1.0},
    ):
        assert "takes a GPU each; give 2" in devices.job_problem(few, two), few
    for enough in ({"gpus_per_node": "a100:2"}, {"gres": "gpu:4"}, {"gres": "tmpdir:1"}, {"num_gpus": 0}, {}):
        assert devices.job_problem(enough, two) == "", enough
    sharded = AccelerateConfig(distributed_type="FSDP", num_processes=2)
    assert devices.job_problem({"partition": "p", "gres": "gpu:2"}, sharded) == ""
    for none in ({"gpus_per_node": 0}, {"additional_parameters": {"reservation": "x"}}):
        assert "needs GPUs" in devices.job_problem({"partition": "p", **none}, sharded), none


@pytest.mark.parametrize("what", JOBS)
def test_jobs_that_cannot_train_a_trial_are_refused_before_the_study_is_registered(what: str, tmp_path: Path) -> None:
    asked, said = JOBS[what]
    asked = [*asked, "hydra/launcher=submitit_slurm", "+method=simpo,dpo", f"results_dir={tmp_path}"]
    with pytest.raises(UsageError, match=re.escape(said)):
        run_sweep(overriding(SMALL, "train.micro_batch_size=2", *asked))
    assert not any(tmp_path.iterdir())


def test_what_a_dead_worker_left_is_launched_again(tmp_path: Path) -> None:
    launcher = Dies(1)
    assert [found.status for found in outcomes(launcher, tmp_path)] == ["complete"]
    assert launcher.launched == 2


def test_a_trial_whose_workers_die_again_and_again_has_failed_by_name(tmp_path: Path) -> None:
    found = outcomes(Dies(100), tmp_path)[0]
    assert found.status == "failed"
    assert "worker: RuntimeError: A worker process managed by the executor was unexpectedly terminated" in found.message


# Places: GPUs and cores of one machine


def test_workers_are_as_many_as_visible_gpus_or_else_cores(monkeypatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5,7")
    assert devices.Machine.here().workers() == 3
    assert devices.Machine.here().workers(2) == 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert devices.Machine.here().workers() == len(os.sched_getaffinity(0))


TAKE = """
import os, sys, time
from harness.config.launchers import LAUNCHERS
from harness.config.machine import Machine
from harness.sweep.launchers import Slots
slots = Slots(Machine.here())
print("asks", file=sys.stderr, flush=True)
print(*slots.take(LAUNCHERS[sys.argv[1]], int(sys.argv[2])), os.environ["CUDA_VISIBLE_DEVICES"], flush=True)
time.sleep(3600)
"""


def worker(tmp_path: Path, *, launcher: str = "submitit_local", count: int = 1, gpus: str = "2,5") -> subprocess.Popen:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": gpus, "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, "-c", TAKE, launcher, str(count)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    assert process.stderr.readline() == "asks\n", "from here on it waits for nothing but its places"
    process.stderr.close()
    return process


def test_trials_of_several_processes_take_as_many_gpus_and_never_wait_for_half_of_them(tmp_path: Path) -> None:
    """Three trials of two GPUs each, on three GPUs: one at a time, with a pair of its own."""
    workers = [worker(tmp_path, count=2, gpus="1,4,7") for _ in range(3)]
    try:
        for _ in range(3):
            lines = wait_for_a_line(workers)
            assert len(lines) == 1, "a second trial found two GPUs"
            ended, line = lines[0]
            *places, visible = line.split()
            assert len(set(places)) == 2
            assert visible == ",".join(places)
            ended.kill()
            ended.wait()
            ended.stdout.close()
            workers.remove(ended)
    finally:
        for process in workers:
            process.kill()
            process.wait()
            process.stdout.close()


def wait_for_a_line(workers: list[subprocess.Popen]) -> list[tuple[subprocess.Popen, str]]:
    """Wait until a worker has said which places it took, and a moment longer for others."""
    ready, _, _ = select.select([process.stdout for process in workers], [], [], 600)
    assert ready, "no worker took its places"
    time.sleep(2)  # all have asked before
    ready, _, _ = select.select([process.stdout for process in workers], [], [], 0)
    return [(process, process.stdout.readline()) for process in workers if process.stdout in ready]


def test_one_process_on_a_machine_with_several_gpus_takes_one_of_them(tmp_path: Path) -> None:
    """Else transformers' Trainer would spread a trial over all of them, and change its batches."""
    process = worker(tmp_path, launcher="basic")
    try:
        assert process.stdout.readline().strip() == "2 2"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_each_worker_has_a_gpu_of_its_own_and_a_killed_one_gives_it_back(tmp_path: Path) -> None:
    first, second = worker(tmp_path), worker(tmp_path)
    waiting = None
    try:
        taken = {first.stdout.readline().strip(), second.stdout.readline().strip()}
        assert taken == {"2 2", "5 5"}
        waiting = worker(tmp_path)
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(3)
        first.send_signal(signal.SIGKILL)
        assert waiting.stdout.readline().strip() in taken
    finally:
        for process in filter(None, (first, second, waiting)):
            process.kill()
            process.wait()
            process.stdout.close()
