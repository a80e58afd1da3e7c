"""DPO's and SimPO's losses as pure functions of log-probabilities: the oracle that tests hold TRL's trainers to.

Shapes are (batch,); log-probabilities are in nats. Training uses TRL's own loss code, not these.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

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
