"""How often a guard passes an arm that is truly equal on it, against simulated studies."""

from __future__ import annotations

import numpy as np
import pytest

from harness.decide.simulate import Setting, draw
from harness.decide.stats import compare
from harness.sweep.chances import guard_passes


@pytest.mark.parametrize(("seeds", "prompts", "margin"), [(3, 300, 0.02), (5, 1319, 0.02), (3, 300, 0.08)])
def test_the_share_is_the_simulated_one(seeds: int, prompts: int, margin: float) -> None:
    rng = np.random.default_rng(3)
    setting = Setting(seeds=(seeds, seeds), prompts=prompts)
    passed = [compare(*draw(setting, 0.0, rng)).lower_bound(0.05) > -margin for _ in range(400)]
    assert guard_passes(seeds, prompts, margin=margin, alpha=0.05) == pytest.approx(np.mean(passed), abs=0.07)


def test_a_wider_margin_and_more_seeds_let_more_pass() -> None:
    assert guard_passes(3, 300, margin=0.02, alpha=0.05) < 0.2
    assert guard_passes(3, 300, margin=0.1, alpha=0.05) > 0.8
