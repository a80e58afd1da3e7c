"""The same trial twice on one machine: the same hashes, losses, weights and scores, bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.study.files import file_sha256, read_json
from tests.conftest import SMALL
from tests.servers import command

ROOT = Path(__file__).resolve().parents[2]
HASHES = ("trial_id", "base_sha256", "data_sha256", "batch_plan_sha256", "consumed_tokens_sha256", "files")


def trained(results: Path, arm: str, *more: str, fresh: bool) -> Path:
    """Run one trial by its command, `fresh` in an interpreter of its own, and return its folder."""
    given = [f"+method={arm}", "seed=3", "study=s", *SMALL, *more, f"results_dir={results}"]
    if fresh:
        words = [sys.executable, "-m", "harness.train", *given]
        environment = os.environ | {"PYTHONHASHSEED": "7"}
        done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    else:
        done = command.run("harness.train", *given)
    assert done.returncode == 0, done.stdout + done.stderr
    return next((results / "s" / "trials").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(("arm", "decoding"), [("dpo", []), ("simpo", ["generate.temperature=1.0", "generate.seed=5"])])
def test_a_trial_that_is_run_twice_comes_out_the_same(arm: str, decoding: list[str], tmp_path: Path) -> None:
    """In two processes; the second with another hash seed for Python, and a cold cache of reference log-probs.

    Answers drawn by chance are those of the seed (another seed: `tests/generate/test_answers.py`).
    """
    first = trained(tmp_path / "a", arm, *decoding, fresh=False)
    second = trained(tmp_path / "b", arm, *decoding, fresh=True)
    one, two = read_json(first / "manifest.json"), read_json(second / "manifest.json")
    for manifest in (one, two):
        manifest["files"].pop("config.yaml")  # it names the results folder, which differs here
    assert {name: one[name] for name in HASHES} == {name: two[name] for name in HASHES}
    for name in ("train.jsonl", "completions.jsonl", "pairs.jsonl", "scores.jsonl"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    weights = "adapter/adapter_model.safetensors"
    assert file_sha256(first / weights) == file_sha256(second / weights)
