"""What was done is not done again: the steps before a checkpoint."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import transformers

from harness.study.manifest import read_manifest
from harness.sweep.design import single_trial
from harness.sweep.problems import compose_run
from harness.train.checkpoints import last_checkpoint
from tests.conftest import overriding, run_one
from tests.servers import command
from tests.train.test_run import configure, train

STEPS, ACCUMULATED = 24, 2


@pytest.mark.slow
def test_steps_before_the_last_checkpoint_are_not_trained_again(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed by -9 after the checkpoint at step k of n, the trial runs n - k steps more, and no other."""
    pairs, micro = f"data.max_train_pairs={4 * STEPS}", f"train.micro_batch_size={4 // ACCUMULATED}"
    overrides = overriding(small, pairs, micro, "train.checkpoint_steps=4", "+method=simpo", "seed=1", "study=s")
    folder = single_trial(compose_run(overrides)).folder
    kept = kill_after_a_checkpoint(overrides, folder)

    trained = []
    real = transformers.Trainer.training_step
    monkeypatch.setattr(
        transformers.Trainer,
        "training_step",
        lambda self, *given, **more: trained.append(self.state.global_step) or real(self, *given, **more),
    )
    config = replace(compose_run(overrides), study="s")
    assert run_one(config, ("golden",)).status == "complete"
    assert trained == [step for step in range(kept, STEPS) for _ in range(ACCUMULATED)]  # steps done before each one
    manifest = read_manifest(folder)
    assert manifest["consumed_tokens_sha256"] == manifest["expected_tokens_sha256"]
    assert [json.loads(line)["step"] for line in (folder / "train.jsonl").read_text().splitlines()] == list(
        range(1, STEPS + 1)
    )


def kill_after_a_checkpoint(overrides: list[str], folder: Path) -> int:
    """Run a trial, kill it once it has a whole checkpoint and still trains; return the step of the checkpoint."""
    trial = command.start("harness.train", *overrides)
    try:
        deadline = time.monotonic() + 1200
        while not list(folder.glob("checkpoints/checkpoint-*/consumed.json")):
            assert trial.process.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        trial.process.kill()
        trial.wait()
    found = last_checkpoint(folder / "checkpoints")
    assert found is not None
    step = int(found[0].name.rpartition("-")[2])
    assert 0 < step < STEPS
    return step


@pytest.mark.slow
def test_at_every_step_there_is_a_whole_checkpoint_whatever_the_clock_says(tmp_path: Path) -> None:
    """The trainer's own rotation goes by dates: after a clock was set back it would delete the newest checkpoint."""
    checkpoints = tmp_path / "checkpoints"
    found: list[str] = []

    def look(step: int, logs: dict) -> None:
        last = last_checkpoint(checkpoints)
        found.append(last[0].name if last and (last[0] / "optimizer.pt").is_file() else "")
        for path in checkpoints.glob("checkpoint-*"):
            os.utime(path, (time.time() + 1e6,) * 2)

    train(configure("simpo", "train.checkpoint_steps=2"), tmp_path, on_step=look)
    assert found == ["", "", "checkpoint-2", "checkpoint-2", "checkpoint-4", "checkpoint-4"]
