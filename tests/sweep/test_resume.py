"""What was done is not done again: steps before a checkpoint, stages whose files are as they were."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import transformers

from harness.study.files import drop_temporaries, write_json
from harness.study.integrity import done_stages, drop_damaged, fingerprints, resume_stages
from harness.study.manifest import read_manifest
from harness.sweep.design import single_trial
from harness.sweep.problems import compose_run
from harness.train.checkpoints import last_checkpoint
from tests.conftest import overriding, run_one
from tests.train.test_run import configure, train

ROOT = Path(__file__).resolve().parents[2]
STEPS, ACCUMULATED = 24, 2


@pytest.mark.slow
def test_steps_before_the_last_checkpoint_are_not_trained_again(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed by -9 after the checkpoint at step k of n, the trial runs n - k steps more, and no other."""
    pairs, micro = f"data.max_train_pairs={4 * STEPS}", f"train.micro_batch_size={4 // ACCUMULATED}"
    overrides = overriding(small, pairs, micro, "train.checkpoint_steps=4", "+method=simpo", "seed=1", "study=s")
    folder = single_trial(compose_run(overrides)).folder
    kept = kill_after_a_checkpoint([sys.executable, "-m", "harness.train", *overrides], folder)

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


def kill_after_a_checkpoint(command: list[str], folder: Path) -> int:
    """Run a trial, kill it once it has a whole checkpoint and still trains; return the step of the checkpoint."""
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        deadline = time.monotonic() + 120
        while not list(folder.glob("checkpoints/checkpoint-*/consumed.json")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
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


def test_what_a_kill_left_half_written_is_deleted_and_nothing_else(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("os.fsync", lambda number: os.kill(os.getpid(), signal.SIGKILL))
    child = os.fork()
    if not child:
        write_json(tmp_path / "manifest.json", {})
    os.waitpid(child, 0)
    (tmp_path / ".lock").touch()
    (tmp_path / "manifest.json").touch()
    assert len(list(tmp_path.iterdir())) == 3
    drop_temporaries(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "manifest.json"}


# Files of a trial that are not what they were, though their size is


@pytest.fixture
def trial(tmp_path: Path) -> Path:
    """A finished trial's folder, without its training."""
    folder = tmp_path / "s" / "trials" / "t"
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(bytes(1000))
    (folder / "config.yaml").write_text("seed: 1\n")
    (folder / "train.jsonl").write_text('{"step": 1}\n')
    for name in ("completions", "pairs", "scores"):
        (folder / f"{name}.jsonl").write_text('{"row": 1}\n')
    done = ["train", "dev", "golden", "score"]
    (folder / "manifest.json").write_text(json.dumps({"done": done, "files": fingerprints(folder, {})}))
    return folder


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[8] ^= 1  # of `{"row": 1}` the number: it stays JSON, of the same size
    path.write_bytes(bytes(content))


LEFT = {
    "adapter/adapter_model.safetensors": set(),
    "completions.jsonl": {"train"},
    "pairs.jsonl": {"train"},
    "scores.jsonl": {"train", "dev", "golden"},
    "config.yaml": {"train", "dev", "golden"},
    "train.jsonl": set(),
}


@pytest.mark.parametrize("name", LEFT)
def test_a_file_that_was_changed_at_equal_size_takes_its_stage_with_it(name: str, trial: Path) -> None:
    assert done_stages(trial, read_manifest(trial)) == {"train", "dev", "golden", "score"}
    flip(trial / name) if name != "config.yaml" else (trial / name).write_text("seed: 2\n")
    assert done_stages(trial, read_manifest(trial)) == LEFT[name]


def test_weights_that_nobody_reads_again_are_compared_by_size_where_they_are_large(trial: Path) -> None:
    flip(trial / "adapter" / "adapter_model.safetensors")
    manifest = read_manifest(trial)
    assert done_stages(trial, manifest, read_bytes=999) == {"train", "dev", "golden", "score"}
    assert resume_stages(trial, manifest) == []


@pytest.mark.parametrize("damage", [flip, Path.unlink, lambda path: path.write_text("")])
def test_a_damaged_log_of_the_training_is_dropped_and_the_trial_trains_again(damage, trial: Path) -> None:
    damage(trial / "train.jsonl")
    drop_damaged(trial, read_manifest(trial))
    assert not (trial / "train.jsonl").exists()
    assert done_stages(trial, read_manifest(trial)) == set()


@pytest.mark.parametrize("content", [b'{"a": 1}\n\x00\x00\n', b'{"a": 1}\n\xff{}\n', b'{"a": 1', b"[1]\n"])
def test_rows_without_a_known_hash_are_dropped_where_they_cannot_be_read(content: bytes, trial: Path) -> None:
    for name, rows in {"preferences.jsonl": content, "benchmarks.jsonl": b'{"a": 1}\n{"a": 2}\n'}.items():
        (trial / name).write_bytes(rows)
    drop_damaged(trial, read_manifest(trial))
    assert not (trial / "preferences.jsonl").exists()
    assert (trial / "benchmarks.jsonl").exists()
