"""The papers' losses, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from harness.train.losses import dpo_loss, dpo_norm_loss, simpo_loss


def test_dpo_on_one_pair() -> None:
    """Log-ratios: chosen -10 - -12 = 2, rejected -20 - -19 = -1; beta 0.5: -log sigmoid(1.5) = log(1 + e^-1.5)."""
    loss = dpo_loss(*(torch.tensor([x]) for x in (-10.0, -20.0, -12.0, -19.0)), beta=0.5)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1.5)))


def test_dpo_is_ln_2_where_the_policy_is_the_reference() -> None:
    logps = torch.randn(8), torch.randn(8)
    assert torch.allclose(dpo_loss(*logps, *logps, beta=0.3), torch.full((8,), math.log(2)))


def test_simpo_on_one_pair() -> None:
    """Means -1.0 and -1.5, beta 2, gamma/beta 0.5: 2 * (0.5 - 0.5) = 0, hence ln 2; at ratio 0: -log sigmoid(1)."""
    means = torch.tensor([-1.0]), torch.tensor([-1.5])
    assert simpo_loss(*means, beta=2.0, gamma_beta_ratio=0.5).item() == pytest.approx(math.log(2))
    assert simpo_loss(*means, beta=2.0, gamma_beta_ratio=0.0).item() == pytest.approx(math.log(1 + math.exp(-1)))


def test_simpo_at_equal_averages_is_softplus_of_gamma() -> None:
    mean = torch.tensor([-1.3])
    for beta, ratio in ((2.0, 0.5), (10.0, 0.3), (2.5, 0.55)):
        assert simpo_loss(mean, mean, beta=beta, gamma_beta_ratio=ratio).item() == pytest.approx(
            math.log1p(math.exp(beta * ratio)), rel=1e-5
        )


def test_the_gradient_at_equal_averages_is_beta_times_sigmoid_of_gamma() -> None:
    chosen = torch.tensor([-1.0], requires_grad=True)
    simpo_loss(chosen, torch.tensor([-1.0]), beta=2.5, gamma_beta_ratio=0.55).backward()
    assert chosen.grad is not None
    assert chosen.grad.item() == pytest.approx(-2.5 / (1 + math.exp(-1.375)), rel=1e-5)


def test_normalised_dpo_is_dpo_for_answers_of_one_token() -> None:
    a, b, c, d = (torch.randn(4) for _ in range(4))
    assert torch.allclose(dpo_norm_loss(a - c, b - d, beta=0.7), dpo_loss(a, b, c, d, beta=0.7))
