"""Attention over a packed row: what each token attends to, and the kernels that compute it.

A row has segments: a prompt, whose keys are its own, and each answer, whose keys are its prompt's and its own. Both are
causal where queries and keys are aligned at their right ends. On a GPU in half precision one call of flash attention
computes all segments of a layer; elsewhere each group of a prompt and its answers is attended by itself.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION = "harness_packed"  # the name under which transformers finds `packed_attention`
MAX_WIDTH = 256  # of a head, in flash attention's kernels
KERNEL_GAP = 2.5  # times a dtype's rounding (0.02 in bf16): the most that a kernel may differ from exact arithmetic

Masks = tuple[tuple[Tensor | None, Tensor], ...]  # of each group's prompt (None: causal) and of its answers


@dataclass(frozen=True)
class Call:
    """What a layer asks of its attention.

    Attributes:
        heads, key_heads: number of query heads, and of key heads, which divides it.
        width, value_width: of a head, of queries and keys, and of values.
        scaling: factor of the scores.
        window: a token attends to itself and the `window` - 1 tokens before it; None: to all before it.
        softcap: scores s become softcap * tanh(s / softcap); None: they stay.
    """

    heads: int
    key_heads: int
    width: int
    value_width: int
    scaling: float
    window: int | None = None
    softcap: float | None = None


@dataclass(frozen=True)
class Segments:
    """Segments of a packed row, laid out once for all layers of a micro-batch.

    Attributes:
        groups: number of queries of each group's prompt, and of each of its answers.
        keys: shape (num_keys,), which of the row's keys each segment reads, one segment after the other.
        query_ends: shape (num_segments + 1,), int32, from 0: where each segment's queries end.
        key_ends: the same of its keys.
        lengths: number of queries and of keys of each segment.
    """

    groups: tuple[tuple[int, tuple[int, ...]], ...]
    keys: Tensor
    query_ends: Tensor
    key_ends: Tensor
    lengths: tuple[tuple[int, int], ...]
    _masks: dict[int | None, Masks] = field(default_factory=dict, repr=False, compare=False)

    @property
    def longest(self) -> int:
        """Number of keys of the longest segment."""
        return max(keys for _, keys in self.lengths)

    def with_tensors(self, move: Callable[[Tensor], Tensor]) -> Segments:
        """Return the segments with their tensors elsewhere; masks are made there again, where they are needed."""
        moved = (move(self.keys), move(self.query_ends), move(self.key_ends))
        return Segments(self.groups, *moved, self.lengths)

    def masks(self, window: int | None) -> Masks:
        """Return which keys of its group each query attends to, bool; a prompt's has its own keys only."""
        if window not in self._masks:
            made = ((_prompt_mask(prompt, window), answer_mask(prompt, rest, window)) for prompt, rest in self.groups)
            place = self.keys.device
            self._masks[window] = tuple((None if a is None else a.to(place), b.to(place)) for a, b in made)
        return self._masks[window]


def segments_of(groups: Sequence[tuple[int, Sequence[int]]]) -> Segments:
    """Lay out segments from the number of tokens in the row of each prompt and of its answers, on the host.

    An answer of which no token is in the row (its last one is not) has no query, and so no segment.
    """
    keys: list[int] = []
    lengths: list[tuple[int, int]] = []
    start = 0
    for prompt, answers in groups:
        own = range(start, start + prompt)
        keys += own
        lengths.append((prompt, prompt))
        start += prompt
        for count in filter(None, answers):
            keys += own
            keys += range(start, start + count)
            lengths.append((count, prompt + count))
            start += count
    ends = [torch.tensor([0, *each]).cumsum(0).to(torch.int32) for each in zip(*lengths, strict=True)]
    kept = tuple((prompt, tuple(answers)) for prompt, answers in groups)
    return Segments(kept, torch.tensor(keys), ends[0], ends[1], tuple(lengths))


def _prompt_mask(prompt: int, window: int | None) -> Tensor | None:
    if window is None or prompt <= window:
        return None
    return torch.ones(prompt, prompt, dtype=torch.bool).tril().triu(1 - window)


def answer_mask(prompt: int, answers: Sequence[int], window: int | None) -> Tensor:
    """Return which keys of a group the answers' tokens attend to, shape (queries, prompt + queries)."""
    blocks = [torch.ones(length, length, dtype=torch.bool).tril() for length in answers]
    mask = torch.cat([torch.ones(sum(answers), prompt, dtype=torch.bool), torch.block_diag(*blocks)], dim=1)
    if window is None or prompt + max(answers, default=0) <= window:
        return mask
    own = [torch.arange(prompt, prompt + length) for length in answers]
    places = torch.cat([torch.arange(prompt), *own])
    return mask & (places[None] > places[prompt:, None] - window)  # as in transformers' `sliding_window_overlay`


def packed_attention(
    module: torch.nn.Module | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    packed: Segments | None = None,
    **variants: float | Tensor | None,
) -> tuple[Tensor, None]:
    """Attend within each segment: query (1, heads, num_tokens, width) -> (1, num_tokens, heads, width).

    Raises:
        NotImplementedError: for variants that this attention does not compute, and where the GPU has no kernel that
            computes them rightly; so that no model is computed wrongly.
    """
    if packed is None:
        raise NotImplementedError("the model does not hand its attention the packed row")
    if variants.get("s_aux") is not None:
        raise NotImplementedError("the model's attention has s_aux")
    call = call_of(query, key, value, scaling, variants)
    if (noted := _NOTED.get()) is not None:
        noted.append(call)
    if call.window is not None and call.window >= packed.longest:
        call = replace(call, window=None)
    dtype = _computed_in(query)
    if query.device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return by_group(query, key, value, packed, call), None
    if problem := kernel_problem(call, dtype, query.device):
        raise NotImplementedError(problem)
    q, k, v = (states[0].transpose(0, 1).to(dtype) for states in (query, key, value))
    return attend_by(kernel_of(call), q, k, v, packed, call)[None], None


AttentionInterface.register(ATTENTION, packed_attention)


@contextlib.contextmanager
def packing(model: PreTrainedModel) -> Iterator[None]:
    """Give a model packed attention inside the block; other calls of the model fail there."""
    before = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


_NOTED: ContextVar[list[Call] | None] = ContextVar("noted", default=None)


@contextlib.contextmanager
def noted_calls() -> Iterator[list[Call]]:
    """Yield a list in which each layer's call of packed attention is noted inside the block."""
    calls: list[Call] = []
    token = _NOTED.set(calls)
    try:
        yield calls
    finally:
        _NOTED.reset(token)


def call_of(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, variants: dict[str, float | Tensor | None]
) -> Call:
    """Return what a layer asks of its attention, from the tensors and arguments that it hands over."""
    window, softcap = variants.get("sliding_window"), variants.get("softcap")
    return Call(
        query.shape[1],
        key.shape[1],
        query.shape[3],
        value.shape[3],
        scaling,
        None if window is None else int(window),
        None if softcap is None else float(softcap),
    )


def _computed_in(query: Tensor) -> torch.dtype:
    """Return the dtype that attention computes in: autocast's inside autocast, as for torch's own attention."""
    kind = query.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype


def by_group(query: Tensor, key: Tensor, value: Tensor, segments: Segments, call: Call) -> Tensor:
    """Attend by torch's attention, twice for each group: without padding, and without a score that is masked away."""
    if query.device.type == "cuda" and call.heads != call.key_heads:
        # In fp32 only the memory-efficient kernel is fast, and it takes equal numbers of heads.
        key, value = (states.repeat_interleave(call.heads // call.key_heads, 1) for states in (key, value))
    parts = []
    spans = [(prompt, sum(answers)) for prompt, answers in segments.groups]
    # Split, not sliced: the gradient of a slice is a tensor of zeros of the whole row's size, one for each slice.
    queries = query.split([length for span in spans for length in span], dim=2)
    keys, values = (states.split([sum(span) for span in spans], dim=2) for states in (key, value))
    masks = segments.masks(call.window)
    for first, rest, k, v, (mask, answers_mask) in zip(queries[::2], queries[1::2], keys, values, masks, strict=True):
        # Causal from the first query on, so that a prompt sees none of the answers' keys.
        parts.append(_attend(first, k, v, mask, call))
        if rest.shape[2]:
            parts.append(_attend(rest, k, v, answers_mask, call))
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous()


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, call: Call) -> Tensor:
    """Attend with a mask, or causally from the first query on where there is none."""
    if mask is not None and mask.shape[1] < key.shape[2]:
        key, value = (states[:, :, : mask.shape[1]] for states in (key, value))
    if call.softcap is not None:
        if mask is None:
            length = query.shape[2]
            key, value = (states[:, :, :length] for states in (key, value))
            mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
        return _attend_by_scores(query, key, value, mask, call)
    is_grouped = query.shape[1] != key.shape[1]
    return scaled_dot_product_attention(
        query, key, value, mask, is_causal=mask is None, scale=call.scaling, enable_gqa=is_grouped
    )


def _attend_by_scores(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, call: Call) -> Tensor:
    """Attend by the definition, scores and all: as transformers' eager attention, the softmax in fp32."""
    repeats = query.shape[-3] // key.shape[-3]
    key, value = (states.repeat_interleave(repeats, -3) for states in (key, value))
    scores = query @ key.transpose(-2, -1) * call.scaling
    if call.softcap is not None:
        scores = (scores / call.softcap).tanh() * call.softcap
    wide = scores.dtype if scores.dtype == torch.float64 else torch.float32
    return scores.masked_fill(~mask, -math.inf).softmax(-1, dtype=wide).to(value.dtype) @ value


# Kernels: queries (num_tokens, heads, width), keys and values (num_keys, key_heads, width), one segment after the other
# -> (num_tokens, heads, width).
Kernel = Callable[[Tensor, Tensor, Tensor, Segments, Call], Tensor]


def attend_by(kernel: Kernel, query: Tensor, key: Tensor, value: Tensor, segments: Segments, call: Call) -> Tensor:
    """Attend by a kernel: query (num_tokens, heads, width), keys and values of the row -> (num_tokens, heads, width).

    Heads are filled up with zeros to one width, a multiple of 8, as kernels need it; no score changes.
    """
    width = -(-max(call.width, call.value_width) // 8) * 8
    key, value = key.index_select(0, segments.keys), value.index_select(0, segments.keys)
    query, key, value = (
        pad(states, (0, width - states.shape[-1])) if states.shape[-1] < width else states
        for states in (query, key, value)
    )
    return kernel(query, key, value, segments, call)[..., : call.value_width]


def by_segment(query: Tensor, key: Tensor, value: Tensor, segments: Segments, call: Call) -> Tensor:
    """Compute what a kernel has to compute, each segment by itself and by the definition."""
    parts = []
    sizes = [[lengths[side] for lengths in segments.lengths] for side in (0, 1)]
    for q, k, v in zip(query.split(sizes[0]), key.split(sizes[1]), value.split(sizes[1]), strict=True):
        mask = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).tril(len(k) - len(q))
        if call.window is not None:
            mask = mask.triu(len(k) - len(q) + 1 - call.window)
        found = _attend_by_scores(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), mask, call)
        parts.append(found.transpose(0, 1))
    return torch.cat(parts)


def torch_flash(query: Tensor, key: Tensor, value: Tensor, segments: Segments, call: Call) -> Tensor:
    """Call torch's flash attention: `varlen_attn` where it takes what is needed (2.12), below it what that one wraps.

    Its backward pass adds in no fixed order unless `torch.use_deterministic_algorithms(True)` is set. That would forbid
    other operations of a training step, and a paired study compares seeds, not bits: it stays off.
    """
    (queries, keys) = (max(lengths[side] for lengths in segments.lengths) for side in (0, 1))
    ends = (segments.query_ends, segments.key_ends, queries, keys)
    left = -1 if call.window is None else call.window - 1
    if (public := varlen_attn()) is not None:
        more = {"scale": call.scaling, "window_size": (left, 0), "enable_gqa": call.heads != call.key_heads}
        found: Tensor = public(query, key, value, *ends, **more)
        return found
    is_causal = call.window is None
    out: Tensor = torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        *ends,
        0.0,
        is_causal,
        False,
        scale=call.scaling,
        window_size_left=left,
        window_size_right=0,
    )[0]
    return out


@functools.cache
def varlen_attn() -> Callable[..., Tensor] | None:
    """Return `torch.nn.attention.varlen.varlen_attn` where its signature has all that is needed."""
    if find_spec("torch.nn.attention.varlen") is None:
        return None
    function: Callable[..., Tensor] = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    needed = {"scale", "window_size", "enable_gqa"}
    return function if needed <= inspect.signature(function).parameters.keys() else None


def flash_attn(query: Tensor, key: Tensor, value: Tensor, segments: Segments, call: Call) -> Tensor:
    """Call the package flash-attn, whose kernel has soft caps."""
    function = importlib.import_module("flash_attn").flash_attn_varlen_func
    (queries, keys) = (max(lengths[side] for lengths in segments.lengths) for side in (0, 1))
    left = -1 if call.window is None else call.window - 1
    found: Tensor = function(
        query,
        key,
        value,
        segments.query_ends,
        segments.key_ends,
        queries,
        keys,
        softmax_scale=call.scaling,
        causal=True,
        window_size=(left, 0),
        softcap=call.softcap or 0.0,
    )
    return found


def kernel_of(call: Call) -> Kernel:
    """Return the kernel for a GPU in half precision."""
    return torch_flash if call.softcap is None else flash_attn


@functools.cache
def kernel_problem(call: Call, dtype: torch.dtype, device: torch.device) -> str:
    """Return why a GPU's kernel cannot compute a call in half precision, or nothing; measured once per process.

    Args:
        call: with the window that is needed, if any.
        dtype: bfloat16 or float16.
        device: of the tensors.
    """
    if max(call.width, call.value_width) > MAX_WIDTH:
        return f"the model's attention has heads of width {max(call.width, call.value_width)}, the kernel at most 256"
    if call.softcap is not None and find_spec("flash_attn") is None:
        return f"the model's attention has a softcap of {call.softcap:g}, for which no kernel is installed (flash-attn)"
    return measured_problem(kernel_of(call), call, dtype, device)


# Tokens in the row of prompts and answers: blocks of 64 and 128 are filled and crossed; one and two tokens, and none.
_CHECKED = ((150, (70, 2)), (5, (20, 0)), (1, (140, 9)))
_CHECKED_WINDOW = 24


def measured_problem(kernel: Kernel, call: Call, dtype: torch.dtype, device: torch.device) -> str:
    """Compare a kernel's output and gradients with exact arithmetic on the same states; return what is wrong.

    Gaps are the largest one over the largest value, of the output and of the gradients of queries, keys and values.
    A window is made shorter, so that it has an effect: kernels take its size as a number.

    Args:
        kernel: the kernel.
        call: what it has to compute.
        dtype: of the states.
        device: of the states.
    """
    if call.window is not None:
        call = replace(call, window=min(call.window, _CHECKED_WINDOW))
    try:
        with _undisturbed(device):
            segments = segments_of(_CHECKED).with_tensors(lambda tensor: tensor.to(device))
            states, grad = _states(call, segments, dtype, device)
            found = _with_gradients(kernel, states, segments, call, grad)
            exact = _with_gradients(by_segment, [each.float() for each in states], segments, call, grad.float())
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ImportError, AttributeError) as error:  # a kernel that this machine cannot run
        return f"the kernel for packed attention fails: {type(error).__name__}: {error}".split("\n")[0]
    gaps = [float((a.float() - b).abs().max() / b.abs().max()) for a, b in zip(found, exact, strict=True)]
    worst, name = max((math.inf if math.isnan(gap) else gap, name) for gap, name in zip(gaps, _COMPARED, strict=True))
    if worst <= KERNEL_GAP * torch.finfo(dtype).eps:
        return ""
    return f"the kernel for packed attention computes {name} wrongly (by {worst:.2g} of the largest value)"


@contextlib.contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Compute with gradients, without autocast and past the hooks of gradient checkpointing, in whatever pass."""
    keep = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False), keep:
        yield


_COMPARED = ("the output", "the queries' gradient", "the keys' gradient", "the values' gradient")


def _states(call: Call, segments: Segments, dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], Tensor]:
    """Draw queries, keys, values and the output's gradient, the same each time, with scores that a soft cap bends."""
    generator = torch.Generator().manual_seed(0)
    tokens = int(segments.query_ends[-1])
    widths = ((call.heads, call.width), (call.key_heads, call.width), (call.key_heads, call.value_width))
    drawn = [torch.randn(tokens, *each, generator=generator) for each in (*widths, (call.heads, call.value_width))]
    spread = max(1.0, (call.softcap or 0.0) / 10)
    drawn[0] *= spread / (call.scaling * math.sqrt(call.width))
    *states, grad = (each.to(device, dtype) for each in drawn)
    return states, grad


def _with_gradients(
    kernel: Kernel, states: Sequence[Tensor], segments: Segments, call: Call, grad: Tensor
) -> list[Tensor]:
    query, key, value = (each.detach().requires_grad_() for each in states)
    out = attend_by(kernel, query, key, value, segments, call)
    return [out.detach(), *torch.autograd.grad(out, (query, key, value), grad)]
