"""A reference in bf16 is computed as the policy is: DPO starts at log 2, and the noise that is left is known."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.numpy import load_file, save_file

import harness.train.logps
import harness.train.run
import harness.train.stage
import harness.train.trainers
from harness.config.schema import RunConfig
from harness.study.manifest import read_manifest
from harness.sweep.design import single_trial
from harness.sweep.problems import compose_run, load_run
from harness.train.layout import Layout, Way
from harness.train.logps import AsTrained, BatchNoise, StaleReferenceError, as_trained, pair_logps, reference_logps
from harness.train.memory import plan_of
from harness.train.run import train_arm
from tests.conftest import SMALL, load_base, overriding, run_one, tokens_of, training_overrides

BF16 = ["train.precision=bf16", "data.max_train_pairs=24", "train.batch_size=8", "train.micro_batch_size=4"]


def configure(*more: str) -> RunConfig:
    return load_run(training_overrides("+method=dpo", *BF16, *more))


def reference(config: RunConfig, base: Any, cache: Path, way: Way, trained: AsTrained | None) -> torch.Tensor:
    how = {"base_sha256": "base", "pad_id": 0, "layout": Layout(way), "trained": trained}
    return reference_logps(tokens_of(config).train, base, cache=cache, **how)


def noise_of(config: RunConfig, base: Any, way: Way = "packed") -> AsTrained:
    rows = tokens_of(config).train.rows
    return as_trained(base, rows, plan_of(config, rows), pad_id=0, layout=Layout(way))


@pytest.mark.parametrize(("tuning", "way"), [("lora", "packed"), ("full", "packed"), ("lora", "padded")])
def test_the_first_loss_is_log_2_whatever_is_trained_and_however_it_is_run(
    tuning: str, way: Way, tmp_path: Path
) -> None:
    """Weights in fp32 under autocast (full) or in bf16 (LoRA): the reference meets the same kernels."""
    config = configure(f"train.tuning={tuning}", "method.learning_rate=1e-5")
    tokens, base = tokens_of(config), load_base(config)
    plan = plan_of(config, tokens.train.rows)
    found = reference(config, base, tmp_path / "cache", way, noise_of(config, base, way))
    result = train_arm(
        config, tokens.train.rows, plan, model=base, chat=tokens.chat, folder=tmp_path, reference=found,
        layout=Layout(way),
    )  # fmt: skip
    assert abs(result.steps[0]["loss"] - math.log(2)) < 1e-4


def test_without_autocast_the_reference_of_a_fully_trained_model_is_another_one(tmp_path: Path) -> None:
    """What the first test would not see: a reference in fp32 of a policy that is multiplied in bf16."""
    config = configure("train.tuning=full")
    base = load_base(config)
    as_policy = reference(config, base, tmp_path, "packed", noise_of(config, base))
    exact = reference(config, base, tmp_path, "packed", None)
    assert (as_policy - exact).abs().mean() > 1e-3
    assert len(list(tmp_path.iterdir())) == 2, "each has a cache of its own"


def test_the_cache_holds_for_trials_of_one_plan_and_not_for_another_plan(tmp_path: Path) -> None:
    config, other = configure("seed=1"), configure("seed=2")
    base = load_base(config)
    first = reference(config, base, tmp_path, "packed", noise_of(config, base))
    assert torch.equal(reference(config, base, tmp_path, "packed", noise_of(config, base)), first)
    assert len(list(tmp_path.iterdir())) == 1
    reference(other, base, tmp_path, "packed", noise_of(other, base))
    assert len(list(tmp_path.iterdir())) == 2
    smaller = replace(config, train=replace(config.train, micro_batch_size=2))
    reference(smaller, base, tmp_path, "packed", noise_of(smaller, base))
    assert len(list(tmp_path.iterdir())) == 3


def test_the_noise_is_measured_between_batches_of_different_sizes(monkeypatch) -> None:
    """This small model has none on a CPU: the tokens beside an answer are made to change it, as other kernels would."""
    config = configure()
    base = load_base(config)
    assert noise_of(config, base).noise == BatchNoise(0.0, 0.0, 0.0)
    real = base.model.forward

    def forward(input_ids, **more):
        found = real(input_ids=input_ids, **more)
        found.last_hidden_state = found.last_hidden_state * (1 + input_ids.numel() / 1000)
        return found

    monkeypatch.setattr(base.model, "forward", forward)
    noise = noise_of(config, base).noise
    assert 0 < noise.per_root_token < noise.mean < noise.largest
    single = replace(config, train=replace(config.train, micro_batch_size=1))
    assert noise_of(single, base).noise.mean > 0, "single pairs are held against pairs in twos"


def test_in_tf32_it_is_computed_in_the_plans_batches_and_without_autocast(tmp_path: Path) -> None:
    config = configure("train.precision=fp32")
    base, rows = load_base(config), tokens_of(config).train.rows
    trained = as_trained(base, rows, plan_of(config, rows), pad_id=0, layout=Layout("packed"), bf16=False)
    assert [len(batch) for batch in trained.batches] == [4] * 6
    found = reference(config, base, tmp_path, "packed", trained)
    assert torch.allclose(found, reference(config, base, tmp_path, "packed", None), atol=1e-3), "a CPU has no TF32"
    reference(config, base, tmp_path, "packed", trained._replace(bf16=True))
    assert len(list(tmp_path.iterdir())) == 3, "each has a cache of its own"


def test_reference_and_policy_multiply_alike_on_a_gpu_in_fp32(tmp_path: Path, monkeypatch) -> None:
    """In TF32; a CPU keeps its exact products in it, and says what it was asked for."""
    asked: dict[str, set[str]] = {"reference": set(), "training": set()}
    real, real_train = pair_logps, harness.train.trainers.PairedDPOTrainer.train

    def noted(*args: Any, **more: Any) -> torch.Tensor:
        if more["desc"].endswith(("reference", "log-probs")) and more.get("batches"):
            asked["reference"].add(torch.get_float32_matmul_precision())
        return real(*args, **more)

    def train(self, *args: Any, **more: Any) -> Any:
        asked["training"].add(torch.get_float32_matmul_precision())
        return real_train(self, *args, **more)

    monkeypatch.setattr(harness.train.logps, "pair_logps", noted)
    monkeypatch.setattr(harness.train.trainers.PairedDPOTrainer, "train", train)
    for module in (harness.train.stage, harness.train.run):
        monkeypatch.setattr(module, "uses_tf32", lambda config: True)
    given = overriding(SMALL, "study=s", f"results_dir={tmp_path}")
    assert run_one(compose_run([*given, "+method=sft", "seed=0"]), ("dev",)).status == "complete"
    config = compose_run([*given, "+method=dpo", "seed=1"])
    assert run_one(config, ("dev",)).status == "complete"
    assert asked == {"reference": {"high"}, "training": {"high"}}
    assert set(read_manifest(single_trial(config).folder)["reference_noise"]) >= {"mean_nats", "first_loss_gap"}
    assert torch.get_float32_matmul_precision() == "highest"


def shifted(cache: Path, nats: float) -> None:
    path = next(cache.glob("*/*.safetensors"))
    keys, sums = (load_file(path)[name] for name in ("keys", "sums"))
    sums = sums + nats
    seal = hashlib.sha256(keys.tobytes() + sums.tobytes()).hexdigest()
    save_file({"keys": keys, "sums": sums}, path, metadata={"sha256": seal})


@pytest.mark.parametrize(
    ("nats", "per_root_token", "is_stale"), [(0.5, 0.1, False), (9.0, 0.1, True), (0.5, 0.0, True)]
)
def test_a_cached_value_may_be_off_by_the_noise_that_was_measured(
    nats: float, per_root_token: float, is_stale: bool, tmp_path: Path
) -> None:
    """Another kernel moves long answers by more than a nat; another base moves them by many."""
    config = configure()
    base = load_base(config)
    trained = AsTrained(noise_of(config, base).batches, BatchNoise(0.0, 0.0, per_root_token))
    reference(config, base, tmp_path, "packed", trained)
    shifted(tmp_path, nats)
    if not is_stale:
        reference(config, base, tmp_path, "packed", trained)
        return
    with pytest.raises(StaleReferenceError, match="delete the folder and run again"):
        reference(config, base, tmp_path, "packed", trained)


@pytest.mark.parametrize("way", ["packed", "padded", "alone"])
def test_where_memory_runs_out_fewer_pairs_are_computed_at_once(way: Way, monkeypatch) -> None:
    """By cuBLAS' words for it; the first batch is halved until it fits, and those after it start smaller."""
    config = configure("train.precision=fp32")
    base, rows = load_base(config), tokens_of(config).train.rows
    expected = pair_logps(base, rows, pad_id=0, desc="", layout=Layout(way))
    most, asked = 300, []
    real = base.model.forward

    def forward(input_ids, **more):
        asked.append(input_ids.numel())
        if input_ids.numel() > most:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
        return real(input_ids=input_ids, **more)

    monkeypatch.setattr(base.model, "forward", forward)
    found = pair_logps(base, rows, pad_id=0, desc="", layout=Layout(way))
    assert torch.allclose(found, expected, atol=1e-4)
    assert way == "alone" or max(asked) > most, "it did run out"
    most = 1
    with pytest.raises(RuntimeError, match="CUBLAS_STATUS_ALLOC_FAILED"):
        pair_logps(base, rows, pad_id=0, desc="", layout=Layout(way))


def test_a_trial_records_the_noise_and_the_first_loss(tmp_path: Path) -> None:
    given = overriding(SMALL, "train.precision=bf16", "study=s", f"results_dir={tmp_path}")
    assert run_one(compose_run([*given, "+method=sft", "seed=0"]), ("dev",)).status == "complete"
    config = compose_run([*given, "+method=dpo", "seed=1"])
    outcome = run_one(config, ("dev",))
    assert outcome.status == "complete", outcome.message
    manifest = read_manifest(single_trial(config).folder)
    noise = manifest["reference_noise"]
    assert set(noise) == {"mean_nats", "largest_nats", "first_loss_gap"}
    assert noise["first_loss_gap"] < 1e-3
    assert not [text for text in manifest["warnings"] if "reference" in text]


def test_a_first_loss_away_from_log_2_is_warned_of(tmp_path: Path, monkeypatch) -> None:
    real = harness.train.logps.reference_logps
    monkeypatch.setattr(
        harness.train.logps, "reference_logps", lambda *args, **more: real(*args, **more) + torch.tensor([0.0, 1.0])
    )
    given = overriding(SMALL, "study=s", f"results_dir={tmp_path}")
    assert run_one(compose_run([*given, "+method=sft", "seed=0"]), ("dev",)).status == "complete"
    config = compose_run([*given, "+method=dpo", "seed=1"])
    assert run_one(config, ("dev",)).status == "complete"
    (said,) = [text for text in read_manifest(single_trial(config).folder)["warnings"] if "reference" in text]
    assert said.startswith("dpo's first loss is 0.6444 and not log 2 (0.6931): its reference is noisy")
