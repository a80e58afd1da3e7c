"""Out of memory: the micro-batch is halved for the whole study, and what does not fit at all fails by name.

No GPU is here: memory "runs out", by torch's own error, wherever a micro-batch has more pairs than a limit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import harness.train.run
from harness.config.schema import RunConfig
from harness.study.errors import DivergedError
from harness.study.files import read_json, read_jsonl
from harness.study.manifest import data_identity, read_manifest
from harness.sweep.app import run_sweep
from harness.sweep.design import single_trial
from harness.sweep.problems import compose_run
from harness.train import trainers
from harness.train.collator import COLLATED
from harness.train.memory import note_seed
from harness.verify import verify_study
from tests.conftest import SMALL, overriding, run_one


@pytest.fixture
def memory(monkeypatch):
    """Return a function that sets how many pairs fit into memory at once."""
    real = trainers.ProvesConsumption.training_step
    limit: dict[str, Any] = {"pairs": 100, "arm": None}

    def training_step(self, model, inputs, *args, **kwargs):
        pairs = len(inputs[COLLATED].rows)
        arm = "simpo" if hasattr(self, "simpo_gamma") else "dpo"
        if pairs > limit["pairs"] and limit["arm"] in (None, arm):
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate for {pairs} pairs.")
        return real(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(trainers.ProvesConsumption, "training_step", training_step)

    def set_limit(pairs: int, arm: str | None = None) -> None:
        limit.update(pairs=pairs, arm=arm)

    return set_limit


@pytest.fixture
def trial(tmp_path: Path):
    given = [*SMALL, "train.batch_size=8", "train.micro_batch_size=8", "study=s", f"results_dir={tmp_path}"]
    assert run_one(compose_run([*given, "+method=sft", "seed=0"]), ("dev",)).status == "complete"

    def make(arm: str, *more: str) -> RunConfig:
        return compose_run([*given, f"+method={arm}", "seed=1", *more])

    return make


def test_both_arms_train_with_the_micro_batch_that_fits_and_as_many_pairs_a_step(memory, trial, tmp_path: Path) -> None:
    """DPO is finished when SimPO runs out of memory: it is trained again, since a study has one batch plan."""
    dpo, simpo = trial("dpo"), trial("simpo")
    assert run_one(dpo, ("dev",)).status == "complete"
    before = read_manifest(single_trial(dpo).folder)
    assert before["micro_batch_size"] == 8
    memory(3)
    outcome = run_one(simpo, ("dev",))
    assert outcome.status == "complete", outcome.message
    assert not single_trial(dpo, ("dev",)).is_complete(), "its batch plan is not the study's any more"
    assert data_identity(tmp_path / "s")["status"] == "not proved"
    assert run_one(dpo, ("dev",)).status == "complete"
    after, other = read_manifest(single_trial(dpo).folder), read_manifest(single_trial(simpo).folder)
    assert after["micro_batch_size"] == other["micro_batch_size"] == 2
    assert after["batch_plan_sha256"] == other["batch_plan_sha256"] != before["batch_plan_sha256"]
    assert after["consumed_tokens_sha256"] == before["consumed_tokens_sha256"], "the steps hold the same pairs"
    assert data_identity(tmp_path / "s")["status"] == "proved"
    assert len(list(read_jsonl(single_trial(dpo).folder / "train.jsonl"))) == 2, "16 pairs in steps of 8"
    settled = read_json(tmp_path / "s" / "micro_batch.json")
    assert (settled["asked"], settled["micro_batch_size"], settled["seeds"]) == (8, 2, {"1": 2})
    assert [(row["arm"], row["from"], row["to"]) for row in settled["halved"]] == [("simpo", 8, 4), ("simpo", 4, 2)]


def test_one_command_trains_both_arms_of_a_seed_alike_and_leaves_finished_seeds_alone(memory, tmp_path: Path) -> None:
    """Seed 1 is finished when memory runs out in seed 2, in its second arm: the first arm of seed 2 trains again."""
    more = ["train.batch_size=8", "train.micro_batch_size=8", "study=s", f"results_dir={tmp_path}"]
    given = overriding(SMALL, "+method=simpo,dpo", *more)
    assert run_sweep([*given, "seed=1"])[0].verdict
    before = {path.parent.name: path.read_text() for path in (tmp_path / "s" / "trials").glob("*/manifest.json")}
    memory(4, arm="dpo")
    (result,) = run_sweep([*given, "seed=1,2"])
    manifests = [read_json(path) for path in (tmp_path / "s" / "trials").glob("*/manifest.json")]
    assert {(m["arm"], m["seed"], m["micro_batch_size"]) for m in manifests} == {
        ("simpo", 1, 8), ("dpo", 1, 8), ("simpo", 2, 4), ("dpo", 2, 4),
    }  # fmt: skip
    assert all(
        (tmp_path / "s" / "trials" / name / "manifest.json").read_text() == text for name, text in before.items()
    )
    assert data_identity(tmp_path / "s")["status"] == "proved"
    assert result.verdict
    assert run_sweep([*given, "seed=1,2"])[0].launched == 0
    assert verify_study(tmp_path / "s") == []
    note_seed(compose_run(overriding(SMALL, "+method=dpo", *more, "seed=1")), 4)
    outdated = "it was trained with a micro-batch of 8, and another trial of its seed with a smaller one"
    assert sum(outdated in problem for problem in verify_study(tmp_path / "s")) == 2


def test_an_arm_that_diverged_is_not_trained_again_for_the_other_ones_memory(
    memory, tmp_path: Path, monkeypatch
) -> None:
    """Regression: it scores worst whatever its micro-batch, and was launched again without end."""
    given = overriding(SMALL, "+method=simpo,dpo", "study=s", "seed=1", f"results_dir={tmp_path}")
    real = harness.train.run.train_arm

    def diverge(config, *args, **kwargs):
        if config.method.name == "simpo":
            raise DivergedError("loss is nan at step 1")
        return real(config, *args, **kwargs)

    monkeypatch.setattr("harness.train.run.train_arm", diverge)
    memory(2, arm="dpo")
    (result,) = run_sweep(given)
    assert sorted(outcome.status for outcome in result.outcomes) == ["complete", "complete", "diverged"]
    assert run_sweep(given)[0].launched == 0


def test_a_trial_that_is_run_for_its_cost_changes_nothing_of_the_study(memory, tmp_path: Path) -> None:
    """Two models in memory run out of it first; the trials that decided stay as they are."""
    given = overriding(SMALL, "+method=simpo,dpo", "study=s", "seed=1", f"results_dir={tmp_path}")
    assert run_sweep(given)[0].verdict
    memory(2)
    (result,) = run_sweep([*given, "measure_costs=true"])
    assert all(outcome.status == "complete" for outcome in result.outcomes), result.outcomes
    assert not (tmp_path / "s" / "micro_batch.json").exists()
    costs = [read_json(path) for path in (tmp_path / "s" / "costs").glob("*/manifest.json")]
    assert {manifest["micro_batch_size"] for manifest in costs} == {2}
    assert not list((tmp_path / "s" / "costs").glob("*/adapter")), "they were run for their seconds"
    assert verify_study(tmp_path / "s") == []


def test_a_smaller_micro_batch_gives_the_same_steps(memory, trial, tmp_path: Path) -> None:
    whole = trial("simpo")
    assert run_one(whole, ("dev",)).status == "complete"
    expected = list(read_jsonl(single_trial(whole).folder / "train.jsonl"))
    memory(4)
    halved = trial("simpo", "study=halved")
    assert run_one(trial("sft", "study=halved"), ("dev",)).status == "complete"
    assert run_one(halved, ("dev",)).status == "complete"
    found = list(read_jsonl(single_trial(halved).folder / "train.jsonl"))
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in found] == pytest.approx([row[key] for row in expected], rel=1e-5)


def test_a_model_that_does_not_fit_at_all_fails_by_name_with_what_to_do(memory, trial) -> None:
    memory(0)
    outcome = run_one(trial("dpo"), ("dev",))
    assert outcome.status == "failed"
    for words in (
        "DoesNotFitError: embedded does not fit",
        "train.micro_batch_size=1",
        "train.gradient_checkpointing=true, train.tuning=qlora, or a smaller",
        "data.max_length",
    ):
        assert words in outcome.message


def test_out_of_memory_elsewhere_fails_by_name_with_what_to_do(trial, monkeypatch) -> None:
    def run_out(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("harness.generate.answers.generate_completions", run_out)
    outcome = run_one(trial("simpo"), ("dev",))
    assert outcome.status == "failed"
    assert "generate: OutOfMemoryError: CUDA out of memory" in outcome.message
    assert "a smaller generate.batch_size" in outcome.message
