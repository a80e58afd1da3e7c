"""One model in memory at a time, in the precision of its use; and none where another process needs the memory."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.config.machine import Machine
from harness.config.schema import RunConfig
from harness.study.errors import DivergedError
from harness.sweep.problems import load_run
from harness.train.memory import FrozenImports, plan_of
from harness.train.run import train_arm
from harness.train.stage import TrainStage
from tests.conftest import new_bases, tokens_of, training_overrides


def configure(*more: str) -> RunConfig:
    return load_run(training_overrides("+method=dpo", "data.max_train_pairs=8", *more))


def lent(bases: Any, config: RunConfig, **how: bool) -> Callable[[], Any]:
    """Lend a base and take it back; return a weak reference to it."""
    with bases.borrow_base(config, **how) as base:
        return weakref.ref(base)


def test_a_base_that_is_released_leaves_memory_although_it_holds_itself_and_was_frozen() -> None:
    """The imports of a later trial exclude all present objects from collection, the base in memory with them."""
    bases, config = new_bases(), configure()
    base = lent(bases, config)
    vars(base())["itself"] = base()
    FrozenImports().freeze()
    assert base() is not None
    bases.release()
    assert base() is None


def test_a_base_whose_weights_were_trained_is_gone_when_the_next_one_is_loaded(tmp_path: Path) -> None:
    bases, config = new_bases(), configure("train.tuning=full")
    tokens = tokens_of(config)

    def train() -> Callable[[], Any]:
        with bases.borrow_base(config, trains_all=True) as base:
            plan = plan_of(config, tokens.train.rows)
            reference = torch.zeros(len(tokens.train.rows), 2)
            train_arm(
                config, tokens.train.rows, plan, model=base, chat=tokens.chat, folder=tmp_path, reference=reference
            )
            return weakref.ref(base)

    trained = train()
    with bases.borrow_policy(config, tmp_path) as policy:
        assert trained() is None, "a policy is one model, and the base would be another"
        assert policy.dtype == torch.float32
    with bases.borrow_base(config):
        assert trained() is None


def test_where_products_run_in_bf16_what_is_trained_is_held_in_fp32_and_what_answers_in_bf16(tmp_path: Path) -> None:
    """Steps of full fine-tuning are smaller than the distance of two numbers in bf16."""
    bases = new_bases()
    found = {}
    for tuning in ("lora", "full"):
        config = configure(f"train.tuning={tuning}", "train.precision=bf16")
        for answers in (False, True):
            with bases.borrow_base(config, answers=answers) as base:
                found[tuning, answers] = base.dtype
    half, whole = torch.bfloat16, torch.float32
    assert found == {("lora", False): half, ("lora", True): half, ("full", False): whole, ("full", True): half}
    with bases.borrow_base(configure("train.tuning=full", "train.precision=bf16")) as base:
        base.save_pretrained(tmp_path / "model")
    with bases.borrow_policy(configure("train.tuning=full", "train.precision=bf16"), tmp_path) as policy:
        assert policy.dtype == half, "as the base answers"


@pytest.mark.parametrize("arm", ["dpo", "simpo"])
def test_no_base_is_in_memory_when_processes_start_to_train(arm: str, tmp_path: Path, monkeypatch) -> None:
    """The reference needs it, and the processes load it again."""
    config = configure()
    config = load_run(
        training_overrides(f"+method={arm}", "accelerate=ddp", f"results_dir={tmp_path}", "train.batch_size=4")
    )
    bases, tokens = new_bases(), tokens_of(config)
    config = replace(config, train=replace(config.train, micro_batch_size=2))
    base = lent(bases, config)
    alive = []

    def start(*args: Any, **more: Any) -> None:
        alive.append(base() is not None)
        raise DivergedError("what starts here is not run")

    monkeypatch.setattr("harness.train.processes.train_in_processes", start)
    stage = TrainStage(
        config, tokens, tmp_path / "trial", "sha", lambda *_: None, lambda _: nullcontext(), bases, Machine((), 2)
    )
    assert stage.run().facts["status"] == "diverged"
    gc.collect()
    assert alive == [False]
