"""From groups of token ids to log-probs of their answers, with no token computed twice: ids -> Packed -> HeadOutput.

A group is a prompt and its answers. All groups of a batch stand in one row without padding, each prompt once: positions
start again after the prompt, and a token attends to its own prompt and its own answer only. Wang and Hegde (arXiv
2410.20305) share prefixes by one mask over the whole row; here no masked score is computed (see
`harness.train.attention`). The head runs on the rows that predict a token of an answer. Log-probs and gradients equal
those of the padded computation up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from trl.kernels import ChunkedLogProbFunction
from trl.trainer.utils import maybe_gather_lm_head_ctx

from harness.data.tokens import TokenPair
from harness.train.attention import Segments, segments_of

if TYPE_CHECKING:
    from torch.autograd.function import BackwardCFunction
    from transformers import PretrainedConfig, PreTrainedModel

CHUNK_BYTES = 64 * 2**20  # of logits that are in memory at once
HEAD_OUTPUTS = ("entropy", "mean_logits", "is_top1")  # TRL's names for what `HeadOutput` holds beside log-probs
TRL_VOCAB_CHUNK = 32768  # columns of the head per step of TRL's kernel

Ids = Sequence[int]
Group = tuple[Ids, Sequence[Ids]]


@dataclass(frozen=True)
class Packed:
    """A batch of groups as one row.

    Attributes:
        input_ids: shape (1, num_tokens); an answer's last token predicts nothing and is left out.
        position_ids: shape (1, num_tokens).
        segments: what the row's tokens attend to.
        predicting: shape (num_targets,), the rows of hidden states that predict the answers' tokens, in order.
        targets: shape (num_targets,), the predicted tokens.
        lengths: number of tokens of each answer, in order.
    """

    input_ids: Tensor
    position_ids: Tensor
    segments: Segments
    predicting: Tensor
    targets: Tensor
    lengths: tuple[int, ...]

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """Number of tokens of each group in the row: of its prompt, of its answers."""
        return tuple((prompt, sum(answers)) for prompt, answers in self.segments.groups)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Packed:
        """Return the batch with its tensors on a device; data loaders call this as they call a tensor's `to`."""
        return self._with_tensors(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Packed:
        """Return the batch in page-locked memory, from which copies to a GPU do not block."""
        return self._with_tensors(Tensor.pin_memory)

    def _with_tensors(self, move: Callable[[Tensor], Tensor]) -> Packed:
        return replace(
            self,
            input_ids=move(self.input_ids),
            position_ids=move(self.position_ids),
            segments=self.segments.with_tensors(move),
            predicting=move(self.predicting),
            targets=move(self.targets),
        )


def groups_of(rows: Sequence[TokenPair], *, share_prefix: bool) -> list[Group]:
    """Return one group per pair, or one per answer where the prompt is computed for each; chosen before rejected."""
    if share_prefix:
        return [(row.prompt_ids, [row.chosen_ids, row.rejected_ids]) for row in rows]
    return [(row.prompt_ids, [answer]) for row in rows for answer in (row.chosen_ids, row.rejected_ids)]


def pack(groups: Sequence[Group]) -> Packed:
    """Lay groups out in one row, on the host."""
    ids: list[int] = []
    positions: list[int] = []
    predicting: list[int] = []
    spans = []
    for prompt, answers in groups:
        start, end = len(ids), len(prompt)
        ids += prompt
        positions += range(end)
        for answer in answers:
            predicting += [start + end - 1, *range(len(ids), len(ids) + len(answer) - 1)]
            ids += answer[:-1]
            positions += range(end, end + len(answer) - 1)
        spans.append((end, [len(answer) - 1 for answer in answers]))
    return Packed(
        torch.tensor([ids]),
        torch.tensor([positions]),
        segments_of(spans),
        torch.tensor(predicting),
        torch.tensor([token for _, answers in groups for answer in answers for token in answer]),
        tuple(len(answer) for _, answers in groups for answer in answers),
    )


class HeadOutput(NamedTuple):
    """Results of the head per row, shape (num_rows,); the metrics are None where they were not requested."""

    log_probs: Tensor
    entropy: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None


def packed_logps(model: PreTrainedModel, packed: Packed, *, metrics: bool = False) -> HeadOutput:
    """Return the log-prob of each target, shape (num_targets,), in nats; inside `packing(model)` only."""
    hidden = packed_hidden_states(model, packed)[packed.predicting]
    return token_logps(model, hidden, packed.targets, metrics=metrics)


def alone_logps(model: PreTrainedModel, packed: Packed, *, metrics: bool = False) -> HeadOutput:
    """Return what `packed_logps` returns, each answer after its prompt in a forward pass of its own.

    The slow way that holds for every causal model: the logits are the model's own, and no row sees another one.

    Args:
        model: a causal LM.
        packed: with one answer in each group.
        metrics: also compute TRL's metrics.
    """
    prompts = packed.input_ids[0].split([length for span in packed.spans for length in span])[::2]
    found = []
    for prompt, answer in zip(prompts, packed.targets.split(packed.lengths), strict=True):
        # With the last token, as TRL runs it: positions may depend on a row's length.
        logits = model(input_ids=torch.cat([prompt, answer])[None], use_cache=False).logits
        found.append(_of_logits(logits[0, len(prompt) - 1 : -1].float(), answer, metrics=metrics))
    logps, *more = (torch.cat(parts) for parts in zip(*found, strict=True))
    return HeadOutput(logps, *more) if metrics else HeadOutput(logps)


def _of_logits(logits: Tensor, targets: Tensor, *, metrics: bool) -> tuple[Tensor, ...]:
    norm = logits.logsumexp(-1, keepdim=True)
    logps = (logits.gather(1, targets[:, None]) - norm).squeeze(1)
    if not metrics:
        return logps, logps, logps, logps
    with torch.no_grad():
        entropy = -((logits - norm).exp() * (logits - norm)).sum(-1)
        return logps, entropy, logits.mean(-1), logits.argmax(-1) == targets


def packed_hidden_states(model: PreTrainedModel, packed: Packed) -> Tensor:
    """Return the backbone's last hidden states, shape (num_tokens, hidden_size)."""
    backbone = model.base_model(
        input_ids=packed.input_ids, position_ids=packed.position_ids, use_cache=False, packed=packed.segments
    )
    states: Tensor = backbone.last_hidden_state[0]
    return states


def answer_sums(logps: Tensor, packed: Packed) -> Tensor:
    """Sum log-probs per answer, in float64: shape (num_targets,) -> (num_answers,)."""
    return torch.stack([part.sum(dtype=torch.float64) for part in logps.split(packed.lengths)])


def token_logps(model: PreTrainedModel, hidden: Tensor, targets: Tensor, *, metrics: bool = False) -> HeadOutput:
    """Return log p(target | hidden) of each row, in nats.

    A frozen head is differentiated here in one pass. A trained head, or one that scales or caps its logits, goes
    through TRL's kernel, which computes the logits again in the backward pass.

    Args:
        model: a causal LM.
        hidden: shape (num_rows, hidden_size), the backbone's last hidden states.
        targets: shape (num_rows,).
        metrics: also compute TRL's metrics.
    """
    head = model.get_output_embeddings()
    scale, cap = _logit_transform(model.config.get_text_config())
    with maybe_gather_lm_head_ctx(head.weight, head.bias):  # ZeRO-3 gathers a module's weights in its own call only
        weight = _whole(head.weight)
        bias = None if head.bias is None else _whole(head.bias)
        plain = scale == 1.0 and cap is None and bias is None
        if plain and hidden.device.type == "cpu" and not weight.requires_grad:
            return HeadOutput(*_FrozenHead.apply(hidden, weight, targets, metrics))
        logps, entropy, _, mean_logits, is_top1 = ChunkedLogProbFunction.apply(
            hidden, weight, bias, targets, 1.0, TRL_VOCAB_CHUNK, cap, scale, HEAD_OUTPUTS if metrics else ()
        )
        return HeadOutput(logps, entropy, mean_logits, is_top1)


def _whole(weight: Tensor) -> Tensor:
    """Return a weight that FSDP2 has split over processes as one tensor; its gradient is split again."""
    whole: Tensor = weight.full_tensor() if isinstance(weight, DTensor) else weight
    return whole


def _logit_transform(config: PretrainedConfig) -> tuple[float, float | None]:
    """Return the factor of a model's logits and their soft cap, as in `trl.add_fused_lm_head`."""
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
    """log softmax(h W^T)[y] with its gradient W[y] - softmax(h W^T) W, computed while the logits are in memory.

    The loss is linear in the gradient of each log-prob, so that the backward pass only scales: two products with the
    head's weight per row, where recomputing the logits would take three.
    """

    @staticmethod
    def forward(
        ctx: BackwardCFunction, hidden: Tensor, weight: Tensor, targets: Tensor, metrics: bool
    ) -> tuple[Tensor | None, ...]:
        num_rows = len(hidden)
        logps, entropy, mean_logits = (hidden.new_empty(num_rows, dtype=torch.float32) for _ in range(3))
        is_top1 = targets.new_empty(num_rows, dtype=torch.bool)
        grads = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        size = max(1, CHUNK_BYTES // (weight.shape[0] * 4))
        for start in range(0, num_rows, size):
            part = slice(start, start + size)
            logits = (hidden[part] @ weight.t()).float()
            # Not log_softmax: its fp32 kernel is off by about 5e-6 nats per token at a vocabulary of 49,152.
            norm = logits.logsumexp(-1, keepdim=True)
            chosen = logits.gather(1, targets[part, None])
            logps[part] = (chosen - norm).squeeze(1)
            if metrics:
                mean_logits[part] = logits.mean(-1)
                is_top1[part] = logits.argmax(-1) == targets[part]
            probs = logits.sub_(norm)
            if metrics:
                entropy[part] = -(probs.exp() * probs).sum(-1)
            if grads is not None:
                torch.mm(probs.exp_().to(weight.dtype), weight, out=grads[part])
                torch.sub(weight[targets[part]], grads[part], out=grads[part])
        if grads is not None:
            ctx.save_for_backward(grads)
        ctx.mark_non_differentiable(entropy, mean_logits, is_top1)
        return (logps, entropy, mean_logits, is_top1) if metrics else (logps, None, None, None)

    @staticmethod
    def backward(ctx: BackwardCFunction, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        (grads,) = ctx.saved_tensors
        return (grad[:, None] * grads).to(grads.dtype), None, None, None
