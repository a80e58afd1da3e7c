"""Log-probabilities of given tokens from hidden states, without the (tokens, vocabulary) logits of a whole batch.

Only rows that predict a token of an answer come in here. In a chunk of rows the logits are made, used and forgotten.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from trl.kernels import ChunkedLogProbFunction

CHUNK_BYTES = 64 * 2**20
_TRL_VOCAB_CHUNK = 32768
METRICS = ("entropy", "mean_logits", "is_top1")


@dataclass(frozen=True)
class HeadOutput:
    """What the head gives for each row, shape (num_rows,); the metrics are None where they were not asked for."""

    log_probs: torch.Tensor
    entropy: torch.Tensor | None = None
    mean_logits: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None


def token_logps(model: Any, hidden: torch.Tensor, targets: torch.Tensor, *, metrics: bool = False) -> HeadOutput:
    """Return log p(target | hidden) of each row, in nats.

    A head that is not trained is differentiated here in one pass; one that is, or that scales or caps its logits, goes
    through TRL's kernel, which computes the logits again in the backward pass.

    Args:
        model: a causal LM.
        hidden: shape (num_rows, hidden_size), the backbone's last hidden states.
        targets: shape (num_rows,).
        metrics: also compute TRL's metrics.
    """
    head = model.get_output_embeddings()
    scale, cap = _logit_transform(model.config.get_text_config())
    plain = scale == 1.0 and cap is None and head.bias is None
    if plain and hidden.device.type == "cpu" and not head.weight.requires_grad:
        return HeadOutput(*_FrozenHead.apply(hidden, head.weight, targets, metrics))
    wanted = METRICS if metrics else ()
    logps, entropy, _, mean_logits, is_top1 = ChunkedLogProbFunction.apply(
        hidden, head.weight, head.bias, targets, 1.0, _TRL_VOCAB_CHUNK, cap, scale, wanted
    )
    return HeadOutput(logps, entropy, mean_logits, is_top1)


def _logit_transform(config: Any) -> tuple[float, float | None]:
    """Return the factor that a model's head puts on its logits, and their soft cap, as in `trl.add_fused_lm_head`."""
    scale = next(
        (
            float(getattr(config, name))
            for name in ("logit_scale", "output_multiplier", "lm_head_multiplier")
            if getattr(config, name, None) is not None
        ),
        None,
    )
    if scale is None and getattr(config, "logits_scaling", None) is not None:
        scale = config.logits_scaling if config.model_type == "hyperclovax" else 1 / config.logits_scaling
    return (1.0 if scale is None else scale), getattr(config, "final_logit_softcapping", None)


class _FrozenHead(torch.autograd.Function):
    """log softmax(h W^T)[y] with its gradient W[y] - softmax(h W^T) W, taken while the logits are there.

    The loss is linear in each log-prob's gradient, so that the backward pass only scales: two products with the head's
    weight for each row, where recomputing the logits would take three.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Any, weight: Any, targets: Any, metrics: bool) -> Any:
        num_rows = len(hidden)
        logps = hidden.new_empty(num_rows)
        grads = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        found = [hidden.new_empty(num_rows) for _ in range(2)] + [targets.new_empty(num_rows, dtype=torch.bool)]
        size = max(1, CHUNK_BYTES // (weight.shape[0] * weight.element_size()))
        for start in range(0, num_rows, size):
            part = slice(start, start + size)
            logits = hidden[part] @ weight.t()
            # Not log_softmax: its fp32 kernel is off by about 5e-6 nats a token at a vocabulary of 49,152.
            norm = logits.logsumexp(-1, keepdim=True)
            chosen = logits.gather(1, targets[part, None])
            logps[part] = (chosen - norm).squeeze(1)
            if metrics:
                found[1][part] = logits.mean(-1)
                found[2][part] = logits.argmax(-1) == targets[part]
            probs = logits.sub_(norm)
            if metrics:
                found[0][part] = -(probs.exp() * probs).sum(-1)
            if grads is not None:
                torch.mm(probs.exp_(), weight, out=grads[part])
                torch.sub(weight[targets[part]], grads[part], out=grads[part])
        ctx.save_for_backward(grads)
        ctx.mark_non_differentiable(*found)
        return logps, *(found if metrics else (None, None, None))

    @staticmethod
    def backward(ctx: Any, grad: Any, *_: Any) -> Any:
        (grads,) = ctx.saved_tensors
        return grad[:, None] * grads, None, None, None
