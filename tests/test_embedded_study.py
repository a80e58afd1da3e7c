"""The embedded study is alive: both arms learn from its pairs, and what should hurt hurts. Real training, one seed.

`benchmarks/embedded_study.md` has the same with all seeds and all golden prompts.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.sweep import run_sweep

pytestmark = pytest.mark.slow

FEWER = ["data.max_golden_prompts=200", "data.max_dev_prompts=10", "tracking=none", "seed=10"]


def means(results: Path, *overrides: str) -> dict[str, float]:
    """Return the share of golden prompts that the base and each arm answer rightly."""
    result = run_sweep(["+method=simpo,dpo", *FEWER, f"results_dir={results}", *overrides])
    assert result is not None
    assert result.verdict is not None
    return result.verdict["means"] | {"sft": result.verdict["base_mean"]}


@pytest.fixture(scope="module")
def default(tmp_path_factory) -> dict[str, float]:
    return means(tmp_path_factory.mktemp("default"))


def test_both_arms_improve_on_the_base_clearly(default) -> None:
    assert 0.3 <= default["sft"] <= 0.65
    for arm in ("simpo", "dpo"):
        assert default[arm] >= default["sft"] + 0.15, default


def test_wrong_labels_hurt_both_arms(default, tmp_path: Path) -> None:
    """With every label flipped an arm learns what the verifier rejects."""
    flipped = means(tmp_path, "data.label_noise=1.0")
    for arm in ("simpo", "dpo"):
        assert flipped[arm] <= default["sft"] - 0.1, flipped


def test_a_bad_learning_rate_hurts_both_arms(default, tmp_path: Path) -> None:
    """Thirty times the default rates."""
    spoilt = means(tmp_path, "arms.dpo.learning_rate=3e-3", "arms.simpo.learning_rate=6e-3")
    for arm in ("simpo", "dpo"):
        assert spoilt[arm] <= default[arm] - 0.1, spoilt
