"""The benchmark: what it counts is right, and it runs both sides on the same pairs. No test asserts seconds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model

from harness.bench.__main__ import main
from harness.bench.page import page
from harness.bench.runs import block_parameters, lora_parameters, needed_flops
from harness.data.tokens import TokenPair
from harness.sweep.problems import load_run
from harness.train.memory import matmul_rate
from tests.conftest import load_base


@pytest.fixture(scope="module")
def model():
    return load_base(load_run(["+method=dpo"]))


def test_parameters_are_those_of_the_model_and_of_pefts_adapter(model) -> None:
    text = model.config.get_text_config()
    assert block_parameters(text) == sum(p.numel() for n, p in model.model.layers.named_parameters() if p.ndim == 2)
    adapted = get_peft_model(model, LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert lora_parameters(text, 3) == sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    adapted.unload()


def test_needed_work_by_hand(model) -> None:
    """Prompt 3, answers 2 and 1: 6 tokens, 3 through the head; squares 9/2 + 2(3+1) + 1(3+.5) = 16."""
    text = model.config.get_text_config()
    row = TokenPair("a", "a", (1, 2, 3), (4, 5), (6,))
    expected = 4 * block_parameters(text) * 6 + 4 * text.vocab_size * text.hidden_size * 3
    expected += 6 * lora_parameters(text, 16) * 6 + 8 * text.num_hidden_layers * text.hidden_size * 16
    assert needed_flops(model.config, [row], lora_rank=16) == pytest.approx(expected)


def test_the_rate_is_a_number_of_operations_per_second() -> None:
    assert 1e8 < matmul_rate(64, 96, seconds=0.05) < 1e15


@pytest.mark.slow
def test_both_sides_run_on_the_same_pairs_in_the_same_order(tmp_path: Path, capsys) -> None:
    """The embedded template writes nothing behind the end of a turn, so that TRL makes the same ids: equal losses."""
    assert main(["--num-pairs", "8", "--repeats", "1", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "cost.json").read_text())
    runs = {(run["side"], run["name"]): run for run in result["runs"]}
    assert set(runs) == {
        ("stock", "dpo"),
        ("stock", "dpo, precomputed"),
        ("stock", "simpo"),
        ("harness", "dpo"),
        ("harness", "simpo"),
    }
    for run in runs.values():
        assert len(run["losses"]) == 2
        assert run["wall"] >= run["seconds"]["train"] > 0
        assert run["peak_memory_bytes"] > 50_000_000
    for arm in ("dpo", "simpo"):
        assert runs["harness", arm]["losses"] == pytest.approx(runs["stock", arm]["losses"], rel=1e-3)
    text = (tmp_path / "cost.md").read_text()
    assert text.strip() == capsys.readouterr().out.strip()
    assert "| dpo against dpo |" in text
    assert page(result) == text


def test_too_few_pairs_are_refused(tmp_path: Path, capsys) -> None:
    assert main(["--num-pairs", "100000", "--out", str(tmp_path)]) == 2
    assert "--num-pairs 100000: embedded has 320 that can be trained on" in capsys.readouterr().err
