"""What a trial costs beside its products: no weights hashed, no data prepared, no number read before the log line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import trl.trainer.dpo_trainer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, TrainerCallback

from harness.config.schema import Engine, RunConfig, Tuning
from harness.data.plan import ConsumedTokens
from harness.sweep.problems import load_run
from harness.train.base import load_base as load
from harness.train.checkpoints import Schedule, last_checkpoint
from harness.train.collator import ROW, TensorComparison
from harness.train.memory import plan_of
from harness.train.run import build_trainer, train_arm
from harness.train.trainers import Unread, read_all
from harness.train.weights import load_checked
from tests.conftest import inputs, load_base, tokens_of, training_overrides

aten = torch.ops.aten
READS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default, aten.masked_select.default}
READS |= {aten.masked_scatter_backward.default}  # selects by a mask, below what a mode sees
READING = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu, torch.Tensor.__array__}


def configure(arm: str, *overrides: str) -> RunConfig:
    return load_run(training_overrides(f"+method={arm}", "data.max_train_pairs=16", *overrides))


def trainer_of(config: RunConfig, folder: Path) -> Any:
    rows = tokens_of(config).train.rows
    is_given = config.method.name == "dpo" and config.train.engine is Engine.paired
    trainer = build_trainer(
        config,
        rows,
        plan_of(config, rows),
        output_dir=folder,
        model=load_base(config),
        chat=tokens_of(config).chat,
        reference=torch.zeros(len(rows), 2) if is_given else None,
    )
    trainer.consumed = ConsumedTokens()
    return trainer


def train(config: RunConfig, folder: Path, **more: Any) -> Any:
    tokens = tokens_of(config)
    given = {"model": load_base(config), "chat": tokens.chat, "folder": folder, **more}
    return train_arm(config, tokens.train.rows, plan_of(config, tokens.train.rows), **given)


class Dispatched(TorchDispatchMode):
    """Counts the operations for which a program waits for a device, below autograd and in C++ too."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = func is aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1])
        if func in READS or by_mask:
            self.found.append(str(func))
        return func(*args, **kwargs or {})


class Called(TorchFunctionMode):
    """Counts the calls that copy a tensor to the host, which a CPU makes without an operation."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READING:
            self.found.append(func.__name__)
        return func(*args, **kwargs or {})


class CountReads(TrainerCallback):
    """Counts reads from a step's first micro-batch to its optimiser, whose steps of Adam are counted on the host."""

    def __init__(self) -> None:
        self.steps: list[list[str]] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.steps.append([])
        self.modes: Sequence[Any] = (Dispatched(self.steps[-1]), Called(self.steps[-1]))
        for mode in self.modes:
            mode.__enter__()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        for mode in reversed(self.modes):
            mode.__exit__(None, None, None)


def reads_by_step(config: RunConfig, folder: Path) -> list[list[str]]:
    trainer = trainer_of(config, folder)
    trainer.comparison = TensorComparison(at_once=False)  # as on a GPU
    counter = CountReads()
    trainer.add_callback(counter)
    trainer.train()
    trainer.comparison.settle()
    assert len(trainer.state.log_history[0]) > 8  # with TRL's metrics
    assert all(type(value) in (int, float) for row in trainer.state.log_history for value in row.values())
    return counter.steps


@pytest.mark.parametrize("arm", ["dpo", "simpo"])
def test_no_number_is_read_within_a_step(arm: str, tmp_path: Path) -> None:
    """Two micro-batches a step; steps with and without the metrics of the whole head."""
    found = reads_by_step(configure(arm, "train.levers.metrics_steps=2"), tmp_path)
    assert len(found) == 4
    assert found == [[]] * 4


def test_the_count_sees_what_trls_own_forward_pass_reads(tmp_path: Path) -> None:
    found: list[str] = []
    with Dispatched(found), Called(found):
        value = torch.arange(3)
        assert value[value > 1].sum().item() == 2
        assert bool(value[0] == 0)
        assert value.tolist() == [0, 1, 2]
        source = torch.ones(3, requires_grad=True)
        torch.zeros(3).masked_scatter(value > 0, source).sum().backward()
    assert len(found) >= 5
    assert str(aten.masked_scatter_backward.default) in found


def test_unread_numbers_are_computed_with_as_python_would() -> None:
    loss, count = torch.tensor(0.1).as_subclass(Unread), torch.tensor(7).as_subclass(Unread)
    kept = {"a": [loss.item() / 3, 2.5], "n": [count.item() // 2], "b": [(loss * 2).mean().item()]}
    total = torch.tensor(3).as_subclass(Unread).sum()
    kept["c"] = [loss.item() if total > 0 else 0.0]
    read_all(kept)
    exact = torch.tensor(0.1).item()
    assert kept == {"a": [exact / 3, 2.5], "n": [3], "b": [torch.tensor(0.1).mul(2).item()], "c": [exact]}
    assert type(kept["n"][0]) is int
    values, mask = torch.tensor([1.0, 2.0, 4.0]).as_subclass(Unread), torch.tensor([True, False, True])
    assert float(values[mask].sum().as_subclass(torch.Tensor)) == 5.0
    assert values[1:].tolist() == [2.0, 4.0]


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_given_reference_has_no_weights_hashed_and_no_reference_loaded(tuning: str, tmp_path, monkeypatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a trial must not pay for this")

    monkeypatch.setattr(trl.trainer.dpo_trainer, "hash_module", refuse)
    monkeypatch.setattr(trl.trainer.dpo_trainer, "create_model_from_path", refuse)
    trainer = trainer_of(configure("dpo", f"train.tuning={tuning}"), tmp_path)
    assert trainer.ref_model is None
    assert trainer.precompute_ref_logps


@pytest.mark.parametrize("arm", ["dpo", "simpo"])
@pytest.mark.parametrize("engine", Engine)
def test_a_trainers_data_are_the_plans_row_numbers_and_are_not_prepared(arm, engine, tmp_path, monkeypatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("row numbers need no preparation")

    monkeypatch.setattr(datasets.Dataset, "map", refuse)
    config = configure(arm, f"train.engine={engine.value}")
    trainer = trainer_of(config, tmp_path)
    assert trainer.train_dataset.column_names == [ROW]
    assert list(trainer.train_dataset[ROW]) == list(plan_of(config, tokens_of(config).train.rows).order)


class TestCheckpoints:
    def test_they_are_due_by_steps_where_these_are_given_and_else_by_minutes(self) -> None:
        now = [100.0]
        by_steps = Schedule(3, 1.0, clock=lambda: now[0])
        assert [step for step in range(1, 8) if by_steps.is_due(step)] == [3, 6]
        by_minutes = Schedule(None, 2.0, clock=lambda: now[0])
        found = []
        for step, seconds in enumerate((60, 119, 1, 119, 2, 300, 1), start=1):
            now[0] += seconds
            found += [step] if by_minutes.is_due(step) else []
        assert found == [2, 4, 6]

    @pytest.mark.parametrize(
        ("minutes", "kept"), [("1e-9", ["", *(f"checkpoint-{i}" for i in (1, 2, 3))]), ("60", [""] * 4)]
    )
    def test_a_trial_keeps_them_by_the_clock_and_none_at_its_end(
        self, minutes: str, kept: list, tmp_path: Path
    ) -> None:
        found = []

        def look(step: int, logs: dict[str, float]) -> None:
            last = last_checkpoint(tmp_path / "checkpoints")
            found.append(last[0].name if last else "")

        train(configure("simpo", f"train.checkpoint_minutes={minutes}"), tmp_path, on_step=look)
        assert found == kept
        assert not (tmp_path / "checkpoints" / "checkpoint-4").exists()

    def test_a_checkpoint_of_an_adapter_holds_no_base(self, tmp_path: Path) -> None:
        train(configure("simpo", "train.checkpoint_steps=2"), tmp_path)
        found = last_checkpoint(tmp_path / "checkpoints")
        assert found is not None
        names = {path.name for path in found[0].rglob("*.safetensors")}
        assert names == {"adapter_model.safetensors"}
        size = sum(path.stat().st_size for path in found[0].rglob("*") if path.name != "tokenizer.json")
        adapter = (found[0] / "adapter_model.safetensors").stat().st_size
        assert size < 4 * adapter  # with Adam's two moments of each weight

    def test_an_old_studys_setting_is_still_taken(self) -> None:
        config = load_run(["+method=dpo", "train.checkpoint_steps=50"])
        assert (config.train.checkpoint_steps, config.train.checkpoint_minutes) == (50, 10.0)
        assert load_run(["+method=dpo"]).train.checkpoint_steps is None


def test_weights_that_are_read_straight_to_a_device_are_the_same_and_have_no_hooks() -> None:
    config = configure("dpo")
    folder = inputs().checkpoints.folder(config.model)
    placed = load_checked(AutoModelForCausalLM, folder, dtype=torch.float32, device_map={"": "cpu"})
    plain = load(config, folder)
    assert config.train.tuning is Tuning.lora
    assert placed.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in placed.state_dict().items())
    assert not any(hasattr(module, "_hf_hook") for module in placed.modules())
