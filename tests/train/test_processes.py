"""Several processes train a trial as one does: the same steps, the same tokens in the same order, the same weights."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from harness.config import machine as devices
from harness.config.compose import config_from
from harness.config.schema import AccelerateConfig, RunConfig
from harness.config.trial_id import plain
from harness.data.plan import BatchPlan, share_of
from harness.study.errors import DivergedError, UsageError, WorkerDiedError
from harness.study.files import read_json, write_json
from harness.sweep.problems import compose_run, load_run
from harness.train.layout import Layout
from harness.train.logps import reference_logps
from harness.train.memory import plan_of
from harness.train.processes import train_in_processes
from harness.train.run import TrainResult, train_arm
from tests.conftest import SMALL, borrowed_base, new_bases, overriding, run_one, tokens_of, training_overrides
from tests.servers import command

ROOT = Path(__file__).resolve().parents[2]
STEP = ["train.batch_size=8", "train.micro_batch_size=2", "method.learning_rate=2e-4"]


# The share of each process


@given(
    rows=st.integers(1, 60), micro=st.integers(1, 4), rounds=st.integers(1, 3), processes=st.integers(1, 5)
)  # fmt: skip
def test_the_shares_weigh_every_pair_as_one_process_does(rows: int, micro: int, rounds: int, processes: int) -> None:
    """By the definition: one process takes the mean over a step's micro-batches of the mean over their pairs."""
    plan = BatchPlan(tuple(range(rows)), micro * rounds * processes, micro)
    shares = [share_of(plan, process, processes) for process in range(processes)]
    assert len({len(share) for share in shares}) == 1, "processes that wait for each other take as many steps"
    found = dict.fromkeys(range(rows), 0.0)
    for number, start in enumerate(range(0, rows, plan.batch_size)):
        taken = [share[number * rounds : (number + 1) * rounds] for share in shares]
        for process in taken:
            for part in process:
                for row in part.rows:
                    found[row] += part.weight / len(part.rows) / len(process) / processes
        step = list(range(start, min(rows, start + plan.batch_size)))
        parts = [step[i : i + micro] for i in range(0, len(step), micro)]
        for part in parts:
            for row in part:
                assert found[row] == pytest.approx(1 / len(parts) / len(part))
        real = [part.rows for turn in zip(*taken, strict=True) for part in turn if part.weight]
        assert [row for part in real for row in part] == step, "process by process, the shares are in the plan's order"


def test_a_single_process_has_the_plan_itself() -> None:
    plan = BatchPlan(tuple(range(11)), 4, 2)
    assert [part.rows for part in share_of(plan, 0, 1)] == [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9), (10,)]
    assert {part.weight for part in share_of(plan, 0, 1)} == {1.0}


# Training


def configure(arm: str, pairs: int, *more: str) -> RunConfig:
    return load_run(training_overrides(f"+method={arm}", f"data.max_train_pairs={pairs}", *STEP, *more))


def reference_of(config: RunConfig, folder: Path) -> Any:
    if config.method.name != "dpo":
        return None
    with borrowed_base(config) as base:
        return reference_logps(tokens_of(config).train, base, base_sha256="base", pad_id=0, cache=folder / "cache")


def alone(config: RunConfig, folder: Path, layout: Layout | None = None) -> TrainResult:
    tokens, reference = tokens_of(config), reference_of(config, folder)
    folder.mkdir(exist_ok=True)
    with new_bases().borrow_base(config, trains_all=True) as base:
        plan = plan_of(config, tokens.train.rows)
        parts = {"model": base, "chat": tokens.chat, "folder": folder, "reference": reference, "layout": layout}
        return train_arm(config, tokens.train.rows, plan, **parts)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next(folder.glob("*/*model.safetensors")))


@pytest.mark.slow
@pytest.mark.parametrize(("arm", "tuning"), [("dpo", "lora"), ("simpo", "full")])
def test_two_processes_equal_one(arm: str, tuning: str, tmp_path: Path) -> None:
    """45 pairs: full steps, and a last one of three micro-batches, the last of which has one pair."""
    one = alone(configure(arm, 45, f"train.tuning={tuning}"), tmp_path / "one")
    config = configure(arm, 45, f"train.tuning={tuning}", "accelerate=ddp")
    seen: list[int] = []
    parts = {"folder": tmp_path / "two", "reference": reference_of(config, tmp_path)}
    two = train_in_processes(
        config, plan_of(config, tokens_of(config).train.rows), on_step=lambda step, logs: seen.append(step), **parts
    )
    assert seen == [step["step"] for step in two.steps] == [1, 2, 3, 4, 5, 6]
    assert two.consumed_tokens_sha256 == one.consumed_tokens_sha256
    assert (two.num_pairs, two.packed, two.parameters) == (45, True, one.parameters)
    for key in ("loss", "grad_norm", "learning_rate"):
        assert [s[key] for s in two.steps] == pytest.approx([s[key] for s in one.steps], rel=1e-5, abs=1e-9), key
    for key in ("rewards/margins", "rewards/accuracies"):  # TRL groups those of a short last step otherwise
        assert [s[key] for s in two.steps[:-1]] == pytest.approx([s[key] for s in one.steps[:-1]], abs=1e-5), key
    ours, theirs = weights(tmp_path / "two"), weights(tmp_path / "one")
    assert ours.keys() == theirs.keys()
    assert max((ours[name] - theirs[name]).abs().max().item() for name in ours) < 1e-6
    assert two.peak_memory_bytes > 2 * 200e6, "of both processes"


@pytest.mark.slow
def test_two_processes_equal_one_where_each_answer_is_run_by_itself(tmp_path: Path) -> None:
    """13 pairs: in the last step one process has two pairs, and the other one pair."""
    layout = Layout("alone", "it was asked for")
    config = configure("simpo", 13, "train.tuning=full", "accelerate=ddp", "train.batch_size=4")
    one = alone(replace(config, accelerate=AccelerateConfig()), tmp_path / "one", layout)
    two = train_in_processes(
        config,
        plan_of(config, tokens_of(config).train.rows),
        folder=tmp_path / "two",
        reference=None,
        layout=layout,
        on_step=lambda *_: None,
    )
    assert not two.packed
    assert two.consumed_tokens_sha256 == one.consumed_tokens_sha256
    for key in ("loss", "grad_norm"):
        assert [s[key] for s in two.steps] == pytest.approx([s[key] for s in one.steps], rel=1e-5, abs=1e-9), key


@pytest.mark.slow
def test_a_killed_run_of_two_processes_leaves_none_behind_and_goes_on_where_it_was(tmp_path: Path) -> None:
    """kill -9 of the trial's process after a checkpoint; then the same trial in one process finishes it."""
    more = ["train.micro_batch_size=2", "data.max_train_pairs=64", "train.checkpoint_steps=1", "study=s"]
    given = overriding(SMALL, *more, "generate.max_new_tokens=4", f"results_dir={tmp_path / 'results'}")
    assert run_one(compose_run([*given, "+method=sft", "seed=0"]), ("dev",)).status == "complete"
    trial = [*given, "+method=simpo", "seed=1"]
    child = command.start("harness.train", *trial, "accelerate=ddp")
    folder, deadline = tmp_path / "results" / "s" / "trials", time.monotonic() + 1200
    while not list(folder.glob("*/checkpoints/checkpoint-*/consumed.json")):
        assert time.monotonic() < deadline, "no checkpoint was written"
        assert child.process.is_alive(), "the run ended before it could be killed"
        time.sleep(0.01)
    child.process.kill()
    child.wait()
    deadline = time.monotonic() + 200
    while running(folder):
        assert time.monotonic() < deadline, "processes outlived their parent"
        time.sleep(0.1)
    place = next(folder.iterdir())
    assert not (place / "adapter").exists(), "it was killed too late to show anything"
    outcome = run_one(compose_run(trial), ("dev",))
    assert outcome.status == "complete", outcome.message
    manifest = read_json(place / "manifest.json")
    assert manifest["consumed_tokens_sha256"] == manifest["expected_tokens_sha256"]
    assert len((place / "train.jsonl").read_text().splitlines()) == 16, "64 pairs in steps of 4"


@pytest.mark.slow
def test_processes_that_are_starting_die_with_their_trial(tmp_path: Path) -> None:
    """kill -9 while the launcher imports, before any process has trained."""
    more = ["train.micro_batch_size=2", "study=s", f"results_dir={tmp_path / 'results'}"]
    given = overriding(SMALL, *more)
    assert run_one(compose_run([*given, "+method=sft", "seed=0"]), ("dev",)).status == "complete"
    child = command.start("harness.train", *given, "+method=simpo", "seed=1", "accelerate=ddp")
    folder, deadline = tmp_path / "results" / "s" / "trials", time.monotonic() + 1200
    while not running(folder):
        assert time.monotonic() < deadline, "the launcher did not start"
        time.sleep(0.01)
    child.process.kill()
    child.wait()
    deadline = time.monotonic() + 600
    while running(folder):
        assert time.monotonic() < deadline, "processes outlived their parent"
        time.sleep(0.05)


@pytest.mark.slow
def test_a_process_that_is_killed_is_a_worker_that_died_and_not_an_error_of_the_training(tmp_path: Path) -> None:
    """The other process only sees that its neighbour is gone, and must not stand as the cause."""
    config = configure("simpo", 320, "accelerate=ddp", "train.epochs=20")
    plan = plan_of(config, tokens_of(config).train.rows)
    killed: list[int] = []

    def kill_one(step: int, logs: dict[str, Any]) -> None:
        for path in [] if killed else Path("/proc").glob("[0-9]*/environ"):
            try:
                is_ours = str(tmp_path).encode() in (path.parent / "cmdline").read_bytes()
                if is_ours and b"\0RANK=1\0" in b"\0" + path.read_bytes():
                    killed.append(int(path.parent.name))
                    os.kill(killed[0], signal.SIGKILL)
            except OSError:
                continue

    with pytest.raises(WorkerDiedError):
        train_in_processes(config, plan, folder=tmp_path, reference=None, on_step=kill_one)
    assert len(killed) == 1


def running(folder: Path) -> list[str]:
    """Return the command lines of processes that work on a trial in this folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = path.read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if str(folder) in text and "harness.train.processes" in text:
            found.append(text)
    return found


@pytest.mark.slow
def test_a_divergence_and_a_failure_in_a_process_are_named(tmp_path: Path) -> None:
    config = configure("dpo", 16, "accelerate=ddp")
    plan = plan_of(config, tokens_of(config).train.rows)
    infinite = torch.full((16, 2), torch.inf)
    with pytest.raises(DivergedError, match=r"(loss|grad_norm) is nan at step 1 of 2"):
        train_in_processes(config, plan, folder=tmp_path / "a", reference=infinite, on_step=lambda *_: None)
    wrong = torch.zeros(3, 2)  # for 16 pairs
    with pytest.raises(RuntimeError, match=r"process [01]: \w*Error"):
        train_in_processes(config, plan, folder=tmp_path / "b", reference=wrong, on_step=lambda *_: None)


@pytest.mark.slow
def test_a_sharded_model_gives_the_same_log_probs_and_gradients() -> None:
    """FSDP2 over two processes, as on GPUs: packed batches and fused adapters find the weights when they need them."""
    sharded = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "-m",
        "tests.train.sharded",
    ]
    done = subprocess.run(sharded, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    assert found["local"] < 0.6 * found["total"], "each process holds half"
    assert found["losses"][0] == pytest.approx(found["losses"][1], rel=1e-6)
    assert found["names"]
    assert found["gap"] < 1e-5


# Configuration


def test_a_config_survives_the_way_to_the_processes(tmp_path: Path) -> None:
    for arm in ("dpo", "simpo", "dpo_norm_margin"):
        config = load_run(
            [
                f"+method={arm}",
                "accelerate=fsdp",
                "train.micro_batch_size=2",
                "decide.guards=[{metric: checks, margin: 0.1}]",
            ]
        )
        write_json(tmp_path / "config.json", plain(config))
        assert config_from(read_json(tmp_path / "config.json")) == config


REFUSED = {
    "steps that cannot be shared": (
        ["accelerate=ddp", "train.batch_size=8", "train.micro_batch_size=8"],
        "accelerate.num_processes=2: a step of train.batch_size=8 has 1 micro-batches of train.micro_batch_size=8",
    ),
    "processes without a way to train together": (
        ["accelerate.num_processes=2"],
        "accelerate.num_processes=2 with accelerate.distributed_type=NO: several processes need accelerate=ddp",
    ),
    "one process together with none": (["accelerate=ddp", "accelerate.num_processes=1"], "these need at least 2"),
    "an unknown preset": (["accelerate=dpp"], "accelerate=dpp: no such accelerate; allowed: ddp, fsdp, none, zero2"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_loaded(case: str) -> None:
    overrides, message = REFUSED[case]
    with pytest.raises(UsageError) as refused:
        load_run(["+method=dpo", *overrides])
    assert message in str(refused.value)


def test_what_this_machine_cannot_do_is_said_before_training(monkeypatch) -> None:
    def problem(preset: str, gpus: tuple[str, ...], *more: str) -> str:
        config = load_run(["+method=dpo", f"accelerate={preset}", "train.micro_batch_size=2", *more])
        return devices.processes_problem(config.accelerate, devices.Machine(gpus, cores=4))

    assert problem("ddp", ()) == ""
    assert "FSDP: needs GPUs, and there are none here" in problem("fsdp", ())
    assert "DEEPSPEED: needs GPUs" in problem("zero3", ())
    two = ("0", "1")
    assert problem("fsdp", two) == ""
    assert "num_processes=4: this machine has 2 GPUs" in problem("ddp", two, "accelerate.num_processes=4")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "DeepSpeed is not installed; pip install deepspeed" in problem("zero2", two)


def test_the_number_of_processes_is_no_part_of_a_trials_identity() -> None:
    from harness.sweep.design import single_trial

    one = load_run(["+method=dpo", "train.micro_batch_size=2"])
    two = load_run(["+method=dpo", "train.micro_batch_size=2", "accelerate=ddp"])
    assert single_trial(one).trial_id == single_trial(two).trial_id
