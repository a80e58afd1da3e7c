"""Packed attention in one call of flash attention for a whole micro-batch, for the GPU check to measure.

`packed_attention` calls torch's attention twice for each pair, with fewer queries than keys or with a mask, which no
flash kernel takes. Here prompts and answers are segments of one row: a prompt's keys are its own, an answer's are its
prompt's and its own, and both are causal when queries and keys are aligned at their ends. Made for `gpu.py`: plain
Llamas only, without windows, soft caps or dropout.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from gpu_harness import ATTENTION, GPU, Packed, packed_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface


@dataclass(frozen=True)
class Layout:
    """Segments of a micro-batch.

    Attributes:
        index: shape (keys of all segments,), which of the row's keys each segment reads, one segment after the other.
        query_ends: shape (segments + 1,), int32, from 0: where each segment's queries end.
        key_ends: the same of the keys.
        max_queries: of one segment.
        max_keys: of one segment.
    """

    index: torch.Tensor
    query_ends: torch.Tensor
    key_ends: torch.Tensor
    max_queries: int
    max_keys: int


@functools.lru_cache(maxsize=1)  # all layers of a micro-batch ask for the same one
def layout_of(packed: Packed) -> Layout:
    """Lay prompts and answers out as segments; an answer of one token has no query, and so no segment."""
    per_group = len(packed.lengths) // len(packed.spans)
    index, queries, keys = [], [], []
    start = 0
    for group, (prompt, rest) in enumerate(packed.spans):
        prompt_index = torch.arange(start, start + prompt)
        index.append(prompt_index)
        queries.append(prompt)
        keys.append(prompt)
        place = start + prompt
        for length in packed.lengths[group * per_group : (group + 1) * per_group]:
            if length > 1:
                index += [prompt_index, torch.arange(place, place + length - 1)]
                queries.append(length - 1)
                keys.append(prompt + length - 1)
                place += length - 1
        start += prompt + rest
    device = packed.input_ids.device
    query_ends, key_ends = (torch.tensor([0, *s]).cumsum(0).to(device, torch.int32) for s in (queries, keys))
    return Layout(torch.cat(index).to(device), query_ends, key_ends, max(queries), max(keys))


def varlen_attention(
    module: torch.nn.Module | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    packed: Packed,
    scaling: float,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Attend as `packed_attention` does: query (1, heads, num_tokens, head_dim) -> (1, num_tokens, heads, head_dim)."""
    layout = layout_of(packed)
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    k, v = k.index_select(0, layout.index), v.index_select(0, layout.index)
    attend = _flash if query.device.type == "cuda" else _by_segment
    return attend(q, k, v, layout, scaling)[None], None


def _flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout, scaling: float) -> torch.Tensor:
    """Call torch's flash attention (torch 2.10 or later), whose arguments differ between versions."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    more: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    more |= {name: value for name, value in (("enable_gqa", True), ("scale", scaling)) if name in known}
    ends = (layout.query_ends, layout.key_ends, layout.max_queries, layout.max_keys)
    return cast(torch.Tensor, varlen_attn(q, k, v, *ends, **more))


def _by_segment(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout, scaling: float) -> torch.Tensor:
    """Compute the same without flash attention, each segment with the mask that flash attention would have."""
    parts = []
    sizes = [ends.diff().tolist() for ends in (layout.query_ends, layout.key_ends)]
    for queries, keys, values in zip(q.split(sizes[0]), k.split(sizes[1]), v.split(sizes[1]), strict=True):
        mask = torch.ones(len(queries), len(keys), dtype=torch.bool).tril(len(keys) - len(queries))
        a, b, c = (states.transpose(0, 1)[None] for states in (queries, keys, values))
        found = scaled_dot_product_attention(a, b, c, mask, scale=scaling, enable_gqa=q.shape[1] != k.shape[1])
        parts.append(found[0].transpose(0, 1))
    return torch.cat(parts)


AS_IT_IS, NO_CUDNN, VARLEN = "as it is", "without cuDNN", "varlen"


@contextlib.contextmanager
def attention_as(kind: str) -> Iterator[None]:
    """Let the paired engine attend by `varlen_attention`, or take cuDNN out of torch's choice of kernels."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    if kind == VARLEN:
        AttentionInterface.register(ATTENTION, varlen_attention)
    elif kind == NO_CUDNN and GPU:
        torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        AttentionInterface.register(ATTENTION, packed_attention)
        if GPU:
            torch.backends.cuda.enable_cudnn_sdp(before)
