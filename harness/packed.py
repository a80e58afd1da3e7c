"""Run answers through a causal LM with nothing computed twice: no padding, and a prompt once for all its answers.

All groups of a batch (a prompt and its answers) stand in one row of tokens. Positions start again after the prompt and
attention sees a token's own prompt and own answer only. (Wang and Hegde, arXiv 2410.20305, share prefixes by a mask
over the whole row; here each block is computed by itself, so that nothing is computed to be masked.) The head runs on
the rows that predict a token of an answer. What comes out equals the padded computation up to rounding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from harness.head import HeadOutput, token_logps

ATTENTION = "harness_packed"
Ids = Sequence[int]


@dataclass(frozen=True)
class Packed:
    """A batch of groups as one row.

    Attributes:
        input_ids: shape (1, num_tokens); an answer's last token predicts nothing and is left out.
        position_ids: shape (1, num_tokens).
        spans: of each group the number of its tokens in the row, of the prompt and of the answers.
        masks: of each group which tokens an answer's token attends to, shape (answer tokens, prompt + answer tokens).
        predicting: shape (num_targets,), the rows of hidden states that predict the answers' tokens, in order.
        targets: shape (num_targets,), the tokens that they predict.
        lengths: number of tokens of each answer, in order.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    spans: tuple[tuple[int, int], ...]
    masks: tuple[torch.Tensor, ...]
    predicting: torch.Tensor
    targets: torch.Tensor
    lengths: tuple[int, ...]


def pack(groups: Sequence[tuple[Ids, Sequence[Ids]]], device: Any = "cpu") -> Packed:
    """Lay groups of a prompt's ids and its answers' ids out in one row."""
    ids: list[int] = []
    positions: list[int] = []
    predicting: list[int] = []
    spans, masks = [], []
    for prompt, answers in groups:
        start, end = len(ids), len(prompt)
        ids += prompt
        positions += range(end)
        for answer in answers:
            predicting += [start + end - 1, *range(len(ids), len(ids) + len(answer) - 1)]
            ids += answer[:-1]
            positions += range(end, end + len(answer) - 1)
        spans.append((end, len(ids) - start - end))
        masks.append(_mask(end, [len(answer) - 1 for answer in answers]).to(device))
    return Packed(
        torch.tensor([ids], device=device),
        torch.tensor([positions], device=device),
        tuple(spans),
        tuple(masks),
        torch.tensor(predicting, device=device),
        torch.tensor([token for _, answers in groups for answer in answers for token in answer], device=device),
        tuple(len(answer) for _, answers in groups for answer in answers),
    )


def _mask(prompt: int, answers: Sequence[int]) -> torch.Tensor:
    blocks = [torch.ones(length, length, dtype=torch.bool).tril() for length in answers]
    return torch.cat([torch.ones(sum(answers), prompt, dtype=torch.bool), torch.block_diag(*blocks)], dim=1)


def packed_attention(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, *, packed: Packed, scaling: float, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """Attend within each group: query (1, heads, num_tokens, head_dim) -> (1, num_tokens, heads, head_dim).

    Raises:
        NotImplementedError: for what this attention does not have, so that no model is computed wrongly.
    """
    window = kwargs.get("sliding_window")
    if window is not None and max(map(sum, packed.spans)) > window:
        raise NotImplementedError(f"the model's attention has a sliding_window of {window}, shorter than a pair")
    for name in ("softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"the model's attention has {name}")
    grouped = {"enable_gqa": key.shape[1] != query.shape[1], "scale": scaling}
    parts = []
    # Split, not sliced: the gradient of a slice is a tensor of zeros of the whole row's size, one for each slice.
    queries = query.split([length for span in packed.spans for length in span], dim=2)
    keys, values = (states.split([sum(span) for span in packed.spans], dim=2) for states in (key, value))
    for first, rest, k, v, mask in zip(queries[::2], queries[1::2], keys, values, packed.masks, strict=True):
        # Causal from the first query on, so that a prompt sees none of the answers' keys.
        parts.append(scaled_dot_product_attention(first, k, v, is_causal=True, **grouped))
        if rest.shape[2]:
            parts.append(scaled_dot_product_attention(rest, k, v, attn_mask=mask, **grouped))
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, packed_attention)


@contextlib.contextmanager
def packing(model: Any) -> Iterator[None]:
    """Give a model packed attention for as long as the block lasts; it can do nothing else meanwhile."""
    before = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def packed_logps(model: Any, packed: Packed, *, metrics: bool = False) -> HeadOutput:
    """Return the log-prob of each target, shape (num_targets,); inside `packing(model)` only."""
    backbone = model.base_model(
        input_ids=packed.input_ids, position_ids=packed.position_ids, use_cache=False, packed=packed
    )
    hidden = backbone.last_hidden_state[0, packed.predicting]
    return token_logps(model, hidden, packed.targets, metrics=metrics)


def answer_sums(logps: torch.Tensor, packed: Packed) -> torch.Tensor:
    """Sum log-probs by answer, in float64: shape (num_targets,) -> (num_answers,)."""
    return torch.stack([part.sum(dtype=torch.float64) for part in logps.split(packed.lengths)])
