"""DPO's and SimPO's losses as pure functions of log-probabilities: the oracle that tests hold TRL's trainers to.

Shapes are (batch,); log-probabilities are in nats. Training uses TRL's own loss code, not these.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness.config.arms import ARMS, BetaConfig, DPOMarginConfig, SimPOConfig

if TYPE_CHECKING:
    from torch import Tensor


def dpo_loss(
    chosen_sum_logps: Tensor,
    rejected_sum_logps: Tensor,
    chosen_ref_sum_logps: Tensor,
    rejected_ref_sum_logps: Tensor,
    *,
    beta: float,
    gamma_beta_ratio: float = 0.0,
) -> Tensor:
    """Return the DPO loss of each pair (Rafailov et al. 2023, arXiv 2305.18290, Eq. 7).

    -log sigmoid(beta * [(log pi(c) - log ref(c)) - (log pi(r) - log ref(r)) - gamma_beta_ratio]), with log-probs summed
    over the answer; the paper's loss has no margin.
    """
    from torch.nn.functional import logsigmoid

    chosen_logratios = chosen_sum_logps - chosen_ref_sum_logps
    rejected_logratios = rejected_sum_logps - rejected_ref_sum_logps
    return -logsigmoid(beta * (chosen_logratios - rejected_logratios - gamma_beta_ratio))


def dpo_norm_loss(
    chosen_mean_logratios: Tensor, rejected_mean_logratios: Tensor, *, beta: float, gamma_beta_ratio: float = 0.0
) -> Tensor:
    """Return the length-normalised DPO loss of each pair: DPO with log-ratios divided by the answer's length."""
    from torch.nn.functional import logsigmoid

    return -logsigmoid(beta * (chosen_mean_logratios - rejected_mean_logratios - gamma_beta_ratio))


def simpo_loss(
    chosen_mean_logps: Tensor, rejected_mean_logps: Tensor, *, beta: float, gamma_beta_ratio: float
) -> Tensor:
    """Return the SimPO loss of each pair (Meng et al. 2024, arXiv 2405.14734, Eq. 6).

    -log sigmoid(beta * mean log pi(c) - beta * mean log pi(r) - gamma), with gamma = gamma_beta_ratio * beta.
    """
    from torch.nn.functional import logsigmoid

    return -logsigmoid(beta * (chosen_mean_logps - rejected_mean_logps - gamma_beta_ratio))


def sft_loss(chosen_sum_logps: Tensor, chosen_lengths: Tensor) -> Tensor:
    """Return the cross-entropy of the chosen answers, the mean over all of their tokens: one number."""
    return -chosen_sum_logps.sum() / chosen_lengths.sum()


def loss_of(method: BetaConfig, policy: Tensor, reference: Tensor, lengths: Tensor) -> Tensor:
    """Return the loss of an arm by its row in the table of arms, as one number: the mean over pairs.

    Args:
        method: the arm, with its hyperparameters.
        policy: summed log-probs of chosen and rejected answers, shape (num_pairs, 2).
        reference: the same of the SFT base; an arm without a reference does not look at them.
        lengths: tokens of the answers, shape (num_pairs, 2).
    """
    arm = ARMS[method.name]
    if isinstance(method, SimPOConfig):
        means = policy / lengths**method.length_norm
        losses = simpo_loss(*means.T, beta=method.beta, gamma_beta_ratio=method.gamma_beta_ratio)
        return losses.mean() + method.sft_weight * sft_loss(policy[:, 0], lengths[:, 0])
    margin = method.gamma_beta_ratio if isinstance(method, DPOMarginConfig) else 0.0
    if arm.per_token:
        ratios = (policy - reference) / lengths
        return dpo_norm_loss(*ratios.T, beta=method.beta, gamma_beta_ratio=margin).mean()
    return dpo_loss(*policy.T, *reference.T, beta=method.beta, gamma_beta_ratio=margin).mean()
