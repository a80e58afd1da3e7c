"""The ablation: eight arms out of three ingredients, their losses, and the ingredients' main effects."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from harness.config.arms import ARMS
from harness.data.inputs import tokens_of
from harness.decide.stats import compare, contrast
from harness.report.claims import INGREDIENTS, effects, ingredient_table
from harness.report.page import render_report
from harness.report.study import read_study
from harness.study.errors import UsageError
from harness.sweep.problems import load_run
from harness.train.base import load_base
from harness.train.logps import pair_logps, reference_logps
from harness.train.losses import dpo_loss, dpo_norm_loss, simpo_loss
from harness.train.memory import plan_of
from harness.train.run import train_arm, with_margin
from tests.study_fixture import build_study

SMALL = ["data.max_train_pairs=8", "train.epochs=1", "train.batch_size=4", "train.micro_batch_size=2"]


def test_the_eight_arms_are_all_combinations_of_the_three_ingredients() -> None:
    forms = {tuple(one.has(arm) for one in INGREDIENTS) for arm in ARMS.values() if arm.trainer}
    assert forms == set(itertools.product([False, True], repeat=3))
    assert [one.has(ARMS["simpo"]) for one in INGREDIENTS] == [True, True, True]
    assert [one.has(ARMS["dpo"]) for one in INGREDIENTS] == [False, False, False]


@pytest.mark.parametrize("arm", [name for name, arm in ARMS.items() if arm.trainer])
def test_the_first_step_is_the_oracles_loss_on_that_batch(arm: str, tmp_path: Path) -> None:
    """An arm with its own reward and margin, computed from log-probs alone, against what TRL's trainer logged."""
    config = load_run([f"+method={arm}", *SMALL])
    tokens, model = tokens_of(config), load_base(config)
    pad_id = tokens.chat.tokenizer.pad_token_id
    rows = tokens.train.rows
    logps = pair_logps(model, rows, pad_id=pad_id, desc="")
    reference = None
    if ARMS[arm].uses_reference:
        reference = reference_logps(tokens.train, model, base_sha256="b", pad_id=pad_id, cache=tmp_path / "cache")
    plan = plan_of(config, rows)
    result = train_arm(config, rows, plan, model=model, chat=tokens.chat, folder=tmp_path, reference=reference)
    batch = list(plan.order[:4])
    lengths = torch.tensor([[len(rows[i].chosen_ids), len(rows[i].rejected_ids)] for i in batch])
    sums = logps[batch]
    beta, ratio = config.method.beta, getattr(config.method, "gamma_beta_ratio", 0.0)
    zeros = torch.zeros(4)
    if not ARMS[arm].uses_reference:
        rewards = sums / lengths if ARMS[arm].per_token else sums
        expected = simpo_loss(rewards[:, 0], rewards[:, 1], beta=beta, gamma_beta_ratio=ratio)
    elif ARMS[arm].per_token:
        expected = dpo_norm_loss(zeros, zeros, beta=beta, gamma_beta_ratio=ratio)
    else:
        expected = dpo_loss(zeros, zeros, zeros, zeros, beta=beta, gamma_beta_ratio=ratio)
    assert result.steps[0]["loss"] == pytest.approx(expected.mean().item(), rel=1e-4)


def test_dpo_with_a_margin_starts_at_softplus_of_gamma() -> None:
    zeros = torch.zeros(1)
    loss = dpo_loss(zeros, zeros, zeros, zeros, beta=0.1, gamma_beta_ratio=5.0)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(0.5)))


def test_a_margin_on_the_reference_is_the_margin_of_the_loss() -> None:
    """Shifting the base's log-prob of the chosen answer is what the oracle's margin does, by sum and by token."""
    rows = tokens_of(load_run(["+method=dpo", *SMALL])).train.rows[:4]
    reference = torch.randn(4, 2)
    policy = torch.randn(4, 2)
    for arm, per_token in (("dpo_margin", False), ("dpo_norm_margin", True)):
        config = load_run([f"+method={arm}", *SMALL])
        ratio = config.method.gamma_beta_ratio
        shifted = with_margin(reference, rows, config)
        lengths = torch.tensor([[len(r.chosen_ids), len(r.rejected_ids)] for r in rows]) if per_token else 1
        before, after = (policy - reference) / lengths, (policy - shifted) / lengths
        torch.testing.assert_close(after[:, 0], before[:, 0] - ratio)
        torch.testing.assert_close(after[:, 1], before[:, 1])
    assert with_margin(reference, rows, load_run(["+method=dpo", *SMALL])) is reference


def test_a_margin_of_dpo_needs_the_cached_reference() -> None:
    for key in ("train.engine=stock", "train.reference=adapter_off"):
        with pytest.raises(UsageError, match="TRL's DPO has no margin"):
            load_run(["+method=dpo_margin", key])


def planted(arm: str, rng: np.random.Generator, prompts: np.ndarray) -> np.ndarray:
    """Scores of an arm: the mean over tokens gives 6 points, the margin 2, leaving out the reference nothing."""
    level = 0.5 + 0.06 * ARMS[arm].per_token + 0.02 * ARMS[arm].has_margin
    return level + prompts + rng.normal(0, 0.01, (5, 1)) + rng.normal(0, 0.2, (5, len(prompts)))


def test_main_effects_recover_what_was_planted() -> None:
    rng = np.random.default_rng(0)
    prompts = rng.normal(0, 0.2, 600)
    scores = {name: planted(name, rng, prompts) for name, arm in ARMS.items() if arm.trainer}
    found = effects(scores)
    assert [pairs for pairs, _ in found.values()] == [4, 4, 4]
    for (_, components), truth in zip(found.values(), (0.0, 0.06, 0.02), strict=True):
        low, high = components.interval(0.95)
        assert low < truth < high
        assert high - low < 0.05


def test_an_effect_of_one_pair_of_arms_is_their_comparison() -> None:
    rng = np.random.default_rng(1)
    scores = {arm: rng.random((3, 40)) for arm in ("dpo", "dpo_norm", "simpo")}
    found = effects(scores)
    assert set(found) == {"Mean over tokens instead of the sum"}
    pairs, components = found["Mean over tokens instead of the sum"]
    assert pairs == 1
    assert components == compare(scores["dpo_norm"], scores["dpo"])


def test_a_contrast_of_three_arms_by_hand() -> None:
    """Weights (1, -1/2, -1/2), two seeds, two prompts, no noise within a run: only the seeds vary."""
    arms = [np.array([[m, m], [m + 0.2, m + 0.2]]) for m in (0.5, 0.3, 0.1)]
    found = contrast(arms, [1.0, -0.5, -0.5])
    assert found.difference == pytest.approx(0.3)
    assert found.seed_variance == pytest.approx((1 + 0.25 + 0.25) * 0.02 / 2)
    assert found.seed_df == pytest.approx(1.5**2 / (1 + 0.0625 + 0.0625))
    assert found.prompt_variance == 0.0


def test_a_report_shows_the_effects_where_the_arms_allow_it(tmp_path: Path) -> None:
    """Two arms have none; with the two between them, each ingredient that they differ in has its row."""
    folder = build_study(tmp_path / "study")
    assert ingredient_table(read_study(folder)) is None
    scores = pd.read_csv(folder / "scores.csv", keep_default_na=False)
    copies = [
        scores[scores["arm"] == old].assign(arm=new) for old, new in (("dpo", "dpo_norm"), ("simpo", "simpo_no_margin"))
    ]
    pd.concat([scores, *copies]).to_csv(folder / "scores.csv", index=False)
    table = ingredient_table(read_study(folder))
    assert table is not None
    assert list(table.frame.index) == [one.name for one in INGREDIENTS]
    assert table.frame.loc["Target margin", "Effect, points"] == "0.0"
    assert table.frame.loc["Mean over tokens instead of the sum", "Effect, points"] == "0.0"
    assert table.frame.loc["No reference model", "Pairs of arms"] == "1"
    render_report(folder)
    for page in ("report.html", "report.md"):
        assert "Which part of SimPO makes the difference" in (folder / page).read_text()
