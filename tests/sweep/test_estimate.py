"""What a study will take is estimated before it starts, near what it takes, and a full disk is seen beforehand."""

from __future__ import annotations

import re
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from harness.config.checkpoint import Checkpoints
from harness.config.machine import Machine
from harness.config.paths import embedded_dir
from harness.data.inputs import Inputs
from harness.study.errors import UsageError
from harness.study.manifest import read_manifest
from harness.sweep.app import print_result, run_sweep
from harness.sweep.estimate import (
    Rates,
    answer_seconds,
    checkpoint_size,
    pass_seconds,
    size_text,
    time_text,
    to_run,
    train_seconds,
)
from harness.sweep.launch import Launching
from harness.sweep.problems import load_run
from harness.train.derived import derive
from tests.conftest import SMALL, load_base, overriding

Disk = namedtuple("Disk", "total used free")


def study(results: Path, *more: str) -> list[str]:
    return overriding(SMALL, "+method=simpo,dpo", "seed=0", "study=s", f"results_dir={results}", *more)


def test_sizes_are_read_from_the_headers_alone() -> None:
    model = load_base(load_run(["+method=dpo"]))
    size = checkpoint_size(embedded_dir())
    assert size.parameters == sum(p.numel() for p in model.parameters())
    linear = [m for name, m in model.named_modules() if type(m).__name__ == "Linear" and "lm_head" not in name]
    assert size.linear_parameters == sum(m.weight.numel() for m in linear)
    assert size.lora_sides == sum(m.in_features + m.out_features for m in linear)


def planned(*more: str) -> tuple:
    """Return a trial's config with the tokens and the sizes that its estimate needs."""
    config, inputs = load_run(["+method=dpo", "data.max_train_pairs=16", *more]), Inputs(Checkpoints(derive))
    return config, inputs.tokens(config), checkpoint_size(embedded_dir())


CPU = Machine((), 2, memory_bytes=10**15)
RATES = Rates(1e9, 4e8)


def test_what_gradient_checkpointing_would_be_is_in_the_time() -> None:
    """Left open it is decided by the device's memory; what is asked for is not."""
    small = replace(CPU, memory_bytes=1)

    def seconds(machine: Machine, *more: str) -> float:
        config, tokens, size = planned(*more)
        return train_seconds(config, tokens, size, machine, RATES)

    on, off = (f"train.gradient_checkpointing={value}" for value in ("true", "false"))
    assert seconds(CPU) == seconds(CPU, off) == seconds(small, off)
    assert seconds(small) == seconds(small, on) == seconds(CPU, on)
    assert 1.1 < seconds(CPU, on) / seconds(CPU, off) < 1.5, "one more forward pass of two"


def test_a_gpu_multiplies_while_python_goes_on() -> None:
    """On a CPU the seconds of Python's part come on top; on a GPU the longer part counts."""
    config, tokens, size = planned()
    slow, fast = (Rates(rate, rate, is_gpu=True) for rate in (1e6, 1e18))
    products, python = (train_seconds(config, tokens, size, CPU, rates) for rates in (slow, fast))
    assert products > 100 * python > 0
    assert train_seconds(config, tokens, size, CPU, replace(slow, products=2e6)) == pytest.approx(products / 2)
    assert train_seconds(config, tokens, size, CPU, replace(fast, products=2e18)) == python
    at_rest = train_seconds(config, tokens, size, CPU, replace(fast, is_gpu=False))
    assert at_rest == pytest.approx(python), "products take no time"


def test_answers_go_at_the_rate_of_products_as_thin_as_a_batch() -> None:
    config, _, size = planned("generate.max_new_tokens=50", "generate.batch_size=10")
    rates = Rates(1e18, 1e6, is_gpu=True)
    once = answer_seconds(config, 10, size, rates)
    assert once == pytest.approx(2 * size.parameters * 10 * 50 / 1e6, rel=0.01)
    assert answer_seconds(config, 10, size, replace(rates, products=1.0)) == once


def test_training_all_weights_takes_more_products_than_an_adapter() -> None:
    config, tokens, size = planned()
    full = planned("train.tuning=full")[0]
    rates = Rates(1e6, 1e6, is_gpu=True)
    ratio = train_seconds(full, tokens, size, CPU, rates) / train_seconds(config, tokens, size, CPU, rates)
    assert 1.0 < ratio < 1.5, "6 against 4 operations a weight, and those of an adapter"


def estimated(results: Path, monkeypatch, *more: str):
    """Return the estimate of a plan, and how many trials are still to be run."""
    from harness.sweep import estimate as planning

    found = {}
    real = planning.estimate

    def keep(design, machine, **given):
        found["estimate"], found["to_run"] = real(design, machine, **given), to_run(design)
        return found["estimate"]

    monkeypatch.setattr(planning, "estimate", keep)
    run_sweep([*study(results, *more), "plan=true"])
    monkeypatch.undo()
    return found["estimate"], found["to_run"]


def test_a_pass_of_the_reference_is_the_forward_part_of_an_epoch() -> None:
    config, tokens, size = planned("train.epochs=1")
    rates = Rates(1e6, 1e6, is_gpu=True)
    share = pass_seconds(config, tokens, size, rates) / train_seconds(config, tokens, size, CPU, rates)
    assert 0.3 < share < 0.5, "2 of 4 operations a weight and token, and none of an adapter"


@pytest.mark.parametrize(
    ("keys", "passes"),
    [
        (["+method=simpo,dpo", "seed=1,2,3"], 1),
        (["+method=simpo,dpo", "seed=1,2,3", "train.precision=bf16"], 3),
        (["+method=dpo", "arms.dpo.beta=0.1,0.5", "seed=1,2", "tuning_seeds=[7]", "train.precision=bf16"], 3),
        (["+method=dpo", "seed=1,2", "train.reference=adapter_off"], 0),
        (["+method=simpo", "seed=1,2", "train.precision=bf16"], 0),
    ],
)
def test_a_grid_pays_for_dpos_reference_once_and_in_bf16_once_for_each_seed(
    keys: list[str], passes: int, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr("harness.sweep.estimate.pass_seconds", lambda *_: 1.0)
    found, _ = estimated(tmp_path, monkeypatch, *keys)
    assert found.reference_seconds == passes


@pytest.mark.slow
@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_disk_and_memory_are_near_what_the_study_takes(tuning: str, tmp_path: Path, monkeypatch) -> None:
    expected, count = estimated(tmp_path, monkeypatch, f"train.tuning={tuning}")
    assert count == (0, 2)
    assert print_result(run_sweep(study(tmp_path, f"train.tuning={tuning}"))[0]) == 0
    folders = sorted((tmp_path / "s" / "trials").iterdir())
    for folder in folders:
        weights = sum(p.stat().st_size for name in ("adapter", "model") for p in (folder / name).rglob("*.safetensors"))
        assert weights == pytest.approx(expected.weight_bytes, rel=0.05)
    used = sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file())
    assert used < expected.disk_bytes < 6 * used + 5e6, "an upper bound, and not a wild one"
    peak = max(read_manifest(folder)["peak_memory_bytes"]["train"] for folder in folders)
    assert 0.4 < expected.memory_bytes / peak < 2.5
    again, count = estimated(tmp_path, monkeypatch, f"train.tuning={tuning}")
    assert count == (0, 0), "what is done costs nothing more"
    assert again.disk_bytes < expected.disk_bytes


def test_a_policy_of_keeping_less_needs_less(tmp_path: Path, monkeypatch) -> None:
    grid = ["arms.dpo.beta=0.05,0.1", "arms.simpo.beta=2,3", "tuning_seeds=[7]", "train.tuning=full"]
    need = {keep: estimated(tmp_path, monkeypatch, *grid, f"keep={keep}")[0] for keep in ("all", "confirmed", "none")}
    weights = need["all"].weight_bytes
    assert need["all"].disk_bytes - need["confirmed"].disk_bytes == 4 * weights  # of the trials that tune
    assert need["confirmed"].disk_bytes - need["none"].disk_bytes == 2 * weights


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Disk(10**9, 10**9 - 10**6, 10**6))
    with pytest.raises(UsageError) as refused:
        run_sweep(study(tmp_path / "results", "arms.dpo.beta=0.05,0.1", "arms.simpo.beta=2,3", "tuning_seeds=[7]"))
    assert "the study needs about" in str(refused.value)
    assert "and 1.0 MB are free" in str(refused.value)
    assert "keep=confirmed" in str(refused.value)
    assert not (tmp_path / "results").exists()


@pytest.mark.slow
def test_a_finished_study_needs_no_room(tmp_path: Path, monkeypatch) -> None:
    """Its command decides and reports again on a disk that is full."""
    grid = ["arms.dpo.beta=0.05,0.1", "tuning_seeds=[7]", "allow_unequal_budgets=true"]
    assert print_result(run_sweep(study(tmp_path, *grid))[0]) == 0
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Disk(10**9, 10**9 - 10**4, 10**4))
    again = run_sweep(study(tmp_path, *grid))[0]
    assert (again.launched, print_result(again)) == (0, 0)


def test_nothing_asks_cuda_before_a_trial_has_taken_its_place(tmp_path: Path, monkeypatch) -> None:
    """What is asked settles which GPUs a process sees: CUDA_VISIBLE_DEVICES, set later, would change nothing."""
    asked = []
    for name in ("is_available", "is_bf16_supported", "device_count"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, name=name: asked.append(name))

    class StopError(Exception):
        pass

    def stop(*_):
        raise StopError

    monkeypatch.setattr(Launching, "run", stop)
    with pytest.raises(StopError):
        run_sweep(study(tmp_path / "results"))
    assert asked == []


def test_the_plan_says_time_memory_and_disk(tmp_path: Path, capsys) -> None:
    assert run_sweep([*study(tmp_path), "plan=true"]) == []
    said = capsys.readouterr().out
    for words in ("time: about", "memory: about", "disk: about", "keep=all"):
        assert words in said
    assert not (tmp_path / "s").exists()


def test_processes_that_this_machine_cannot_run_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="FSDP: needs GPUs"):
        run_sweep(study(tmp_path / "results", "accelerate=fsdp", "train.micro_batch_size=2"))
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("count", "text"), [(5, "5 B"), (1500, "1.5 kB"), (25_000_000, "25 MB"), (3.2e9, "3.2 GB"), (2e13, "20.0 TB")]
)
def test_bytes_are_written_as_one_reads_them(count: float, text: str) -> None:
    assert size_text(count) == text


def test_seconds_are_written_as_one_reads_them() -> None:
    assert [time_text(s) for s in (12.3, 600, 7200)] == ["12 s", "10 min", "2.0 h"]


def test_the_plan_counts_the_pairs_that_are_trained_on(tmp_path: Path, capsys) -> None:
    """Most answers are too long for the setting: the plan says so, and counts the steps of the others."""
    assert run_sweep([*study(tmp_path, "data.max_length=24"), "plan=true"]) == []
    said = capsys.readouterr().out
    dropped = re.search(r"dropped training pairs: (\d+): longer than data\.max_length=24", said)
    pairs = re.search(r"each trial: (\d+) pairs", said)
    assert dropped
    assert pairs
    assert int(dropped[1]) + int(pairs[1]) == 16
