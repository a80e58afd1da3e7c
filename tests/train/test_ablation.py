"""The ablation: eight arms out of three ingredients, and the loss of each against the oracle."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from harness.config.arms import ARMS
from harness.study.errors import UsageError
from harness.sweep.problems import load_run
from harness.train.logps import pair_logps, reference_logps
from harness.train.losses import dpo_loss, dpo_norm_loss, simpo_loss
from harness.train.memory import plan_of
from harness.train.run import train_arm, with_margin
from tests.conftest import load_base, tokens_of

SMALL = ["data.max_train_pairs=8", "train.epochs=1", "train.batch_size=4", "train.micro_batch_size=2"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("+method=simpo_no_margin method.gamma_beta_ratio=0.5", "=0.5: simpo_no_margin is the arm without margin"),
        ("+method=simpo_sum_no_margin method.gamma_beta_ratio=1", "=1: simpo_sum_no_margin is the arm without"),
        ("+method=simpo_sum method.length_norm=1", "length_norm=1: simpo_sum is the arm without length normalisation"),
    ],
)
def test_an_arm_that_would_be_another_row_of_the_table_is_refused(given: str, said: str) -> None:
    """The report's effects of margin and length normalisation are read from the rows."""
    with pytest.raises(UsageError, match=said):
        load_run([*given.split(), *SMALL])


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
