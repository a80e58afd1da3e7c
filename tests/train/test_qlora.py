"""QLoRA: an adapter on a base in 4 bits, with both arms alike. Runs bitsandbytes' CPU kernels, where they are installed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.config.footprint import Load, footprint
from harness.config.schema import Engine, RunConfig, Tuning
from harness.study.errors import UsageError
from harness.study.manifest import read_manifest
from harness.sweep.problems import compose_run, load_run
from harness.train.base import is_quantised
from harness.train.logps import reference_logps
from harness.train.memory import model_shape, plan_of
from harness.train.run import TrainResult, build_trainer, train_arm
from tests.conftest import SMALL, load_base, new_bases, tokens_of, training_overrides

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: 4-bit training is not tested")


def configure(arm: str, *more: str) -> RunConfig:
    return load_run(training_overrides(f"+method={arm}", "train.tuning=qlora", "data.max_train_pairs=24", *more))


def trainer_of(config: RunConfig, folder: Path) -> Any:
    tokens = tokens_of(config)
    rows = tokens.train.rows
    reference = torch.zeros(len(rows), 2) if config.method.name == "dpo" else None
    parts = {"model": load_base(config), "chat": tokens.chat, "reference": reference}
    return build_trainer(config, rows, plan_of(config, rows), output_dir=folder, **parts)


def run(config: RunConfig, folder: Path) -> TrainResult:
    tokens = tokens_of(config)
    rows, base = tokens.train.rows, load_base(config)
    reference = None
    if config.method.name == "dpo" and config.train.engine is Engine.paired:
        reference = reference_logps(tokens.train, base, base_sha256="base", pad_id=0, cache=folder / "cache")
    folder.mkdir(parents=True, exist_ok=True)
    plan = plan_of(config, rows)
    return train_arm(config, rows, plan, model=base, chat=tokens.chat, folder=folder, reference=reference)


def test_both_arms_start_from_the_same_bits(tmp_path: Path) -> None:
    """TRL alone would give DPO an adapter in bf16 and SimPO one in fp32."""
    states = []
    for arm in ("dpo", "simpo"):
        trainer = trainer_of(configure(arm), tmp_path / arm)
        assert is_quantised(trainer.model)
        trained = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
        assert trained
        assert {p.dtype for p in trained.values()} == {torch.float32}
        assert all("lora_" in name for name in trained)
        states.append(trained | {name: p.detach().clone() for name, p in trainer.model.named_parameters()})
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["dpo", "simpo"])
def test_the_paired_engine_equals_the_stock_trainers_on_a_base_in_four_bits(arm: str, tmp_path: Path) -> None:
    config = configure(arm, "method.learning_rate=2e-4")
    stock = replace(config, train=replace(config.train, engine=Engine.stock))
    ours, theirs = run(config, tmp_path / "ours"), run(stock, tmp_path / "stock")
    assert ours.packed
    assert ours.consumed_tokens_sha256 == theirs.consumed_tokens_sha256
    for key in ("loss", "grad_norm"):
        assert [s[key] for s in ours.steps] == pytest.approx([s[key] for s in theirs.steps], rel=1e-4)
    whole = load_base(replace(config, train=replace(config.train, tuning=Tuning.lora)))
    assert ours.parameters["total"] - ours.parameters["trainable"] == sum(p.numel() for p in whole.parameters())


def test_reference_log_probs_of_the_whole_base_are_not_taken_for_those_of_the_quantised_one(tmp_path: Path) -> None:
    config = configure("dpo")
    pairs = tokens_of(config).train
    found = []
    for tuning in (Tuning.lora, Tuning.qlora):
        base = load_base(replace(config, train=replace(config.train, tuning=tuning)))
        found.append(reference_logps(pairs, base, base_sha256="base", pad_id=0, cache=tmp_path))
    gap = (found[0] - found[1]).abs().mean()
    assert 0 < gap < 5


def test_the_bytes_of_a_base_in_four_bits_are_those_that_are_counted() -> None:
    config = configure("dpo")
    base = load_base(config)
    held = sum(p.numel() * p.element_size() for p in base.parameters())
    for module in base.modules():
        if (state := getattr(getattr(module, "weight", None), "quant_state", None)) is not None:
            held += sum(t.numel() * t.element_size() for t in (state.absmax, state.state2.absmax))
    counted = footprint(config, model_shape(base), Load(1, 1), bf16=False, checkpointing=False)
    adapter = 4 * config.train.lora_rank * model_shape(base).sides
    assert counted.weights - adapter == pytest.approx(held, rel=0.02)


@pytest.mark.slow
def test_a_trial_answers_with_the_base_that_it_was_trained_on(tmp_path: Path) -> None:
    from tests.conftest import run_one

    results = f"results_dir={tmp_path / 'results'}"
    given = [*SMALL, "train.tuning=qlora", "study=s", results]
    assert run_one(compose_run([*given, "+method=sft", "seed=0"]), ("dev",)).status == "complete"
    config = compose_run([*given, "+method=simpo", "seed=1"])
    outcome = run_one(config, ("dev",))
    assert outcome.status == "complete", outcome.message
    folder = next((tmp_path / "results" / "s" / "trials").iterdir())
    assert read_manifest(folder)["parameters"]["trainable"] > 0
    bases = new_bases()
    with bases.borrow_base(config) as base:
        before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    with bases.borrow_policy(config, folder) as policy:
        assert policy.base_model.model is base
        assert is_quantised(policy)
    with bases.borrow_base(config) as again:
        assert again is base
        assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in before.items())


def test_without_bitsandbytes_it_is_refused_with_what_to_install(monkeypatch) -> None:
    monkeypatch.setattr("harness.train.stage.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"train.tuning=qlora: bitsandbytes is not installed; pip install .*\[qlora\]"):
        configure("dpo")
