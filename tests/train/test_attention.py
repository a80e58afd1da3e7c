"""Attention over a packed row: segments, windows, soft caps, and the check by which a wrong kernel is found."""

from __future__ import annotations

import sys
import types
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)
from transformers.masking_utils import sliding_window_causal_mask_function

from harness.data.tokens import TokenPair
from harness.train.attention import (
    Call,
    Segments,
    attend_by,
    by_segment,
    flash_attn,
    kernel_problem,
    measured_problem,
    noted_calls,
    packed_attention,
    packing,
    segments_of,
    torch_flash,
)
from harness.train.logps import packing_problem
from harness.train.packed import groups_of, pack, packed_hidden_states, packed_logps
from tests.conftest import tiny_model

CPU = torch.device("cpu")
# Prompts of 5, 1 and 4 tokens, answers of 1 to 6: an answer of one token has no query.
GROUPS = [
    ([5, 6, 7, 8, 9], [[8, 9, 2], [10, 2, 3, 4, 5, 6]]),
    ([3], [[4, 2], [11, 12, 13, 14, 2]]),
    ([1, 2, 3, 4], [[9], [8, 7]]),
]
ALONE = [(prompt, [answer]) for prompt, answers in GROUPS for answer in answers]
CALL = Call(heads=4, key_heads=2, width=8, value_width=8, scaling=0.3)


def test_segments_by_hand() -> None:
    """Prompt of 2, answers of 3 and 1: the row is p p a a; the prompt's last token predicts the answer of one token."""
    segments = segments_of([(2, [2, 0])])
    assert segments.keys.tolist() == [0, 1, 0, 1, 2, 3]
    assert (segments.query_ends.tolist(), segments.key_ends.tolist()) == ([0, 2, 4], [0, 2, 6])
    assert segments.lengths == ((2, 2), (2, 4))
    assert segments.query_ends.dtype == segments.key_ends.dtype == torch.int32  # as kernels need them


@pytest.mark.parametrize("window", [1, 2, 3, 7, 20])
def test_a_windows_mask_is_transformers_own(window: int) -> None:
    prompt, answers = 5, [4, 6]
    ((prompt_mask, answer_mask),) = segments_of([(prompt, answers)]).masks(window)
    theirs = sliding_window_causal_mask_function(window)

    def sees(query: int, key: int) -> bool:
        return bool(theirs(0, 0, torch.tensor(query), torch.tensor(key)))

    if prompt_mask is None:  # causal, as without a window
        assert window >= prompt
    else:
        assert all(prompt_mask[q, k] == sees(q, k) for q in range(prompt) for k in range(prompt))
    row = 0
    for number, length in enumerate(answers):
        start = prompt + sum(answers[:number])
        for q in range(prompt, prompt + length):
            expected = [sees(q, k) for k in range(prompt + length)]
            own = answer_mask[row, [*range(prompt), *range(start, start + length)]]
            assert own.tolist() == expected
            assert int(answer_mask[row].sum()) == sum(expected)  # and nothing of the other answer
            row += 1


def attended(attend: Any, call: Call, groups: Sequence[Any]) -> list[Tensor]:
    """Return the output and the gradients of queries, keys and values."""
    packed = pack(groups)
    tokens = packed.input_ids.shape[1]
    generator = torch.Generator().manual_seed(0)
    shapes = ((call.heads, call.width), (call.key_heads, call.width), (call.key_heads, call.value_width))
    states = [
        torch.randn(1, n, tokens, d, dtype=torch.float64, generator=generator).requires_grad_() for n, d in shapes
    ]
    out = attend(states, packed.segments)
    weights = torch.randn(out.shape, dtype=torch.float64, generator=generator)
    return [out, *torch.autograd.grad((out * weights).sum(), states)]


@pytest.mark.parametrize("groups", [GROUPS, ALONE], ids=["shared prompts", "one answer each"])
@pytest.mark.parametrize("window", [None, 1, 2, 4, 100])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(("value_width", "key_heads"), [(8, 2), (8, 4), (5, 1)])
def test_segments_and_groups_compute_the_same_with_their_gradients(
    groups, window, softcap, value_width, key_heads
) -> None:
    call = replace(CALL, window=window, softcap=softcap, value_width=value_width, key_heads=key_heads)

    def by_group(states: list[Tensor], segments: Segments) -> Tensor:
        variants = {"sliding_window": window, "softcap": softcap}
        return packed_attention(None, *states, None, packed=segments, scaling=0.3, **variants)[0]

    def by_kernel(states: list[Tensor], segments: Segments) -> Tensor:
        return attend_by(by_segment, *(each[0].transpose(0, 1) for each in states), segments, call)[None]

    for ours, theirs in zip(attended(by_group, call, groups), attended(by_kernel, call, groups), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)


HEADS = {"head_dim": 8, "query_pre_attn_scalar": 8}
MODELS: dict[str, Any] = {
    "Mistral, all layers in a window": (MistralConfig, MistralForCausalLM, {"sliding_window": 3, "head_dim": 8}),
    "Gemma 2, every second layer, soft caps": (
        Gemma2Config,
        Gemma2ForCausalLM,
        {**HEADS, "sliding_window": 3, "attn_logit_softcapping": 0.5, "attn_implementation": "eager"},
    ),
    "Gemma 3": (Gemma3TextConfig, Gemma3ForCausalLM, {**HEADS, "sliding_window": 4}),
}


@pytest.mark.parametrize("kind", MODELS)
def test_models_with_windows_and_soft_caps_run_packed(kind: str) -> None:
    """In float64, against one answer at a time through the model's own attention."""
    config_class, model_class, more = MODELS[kind]
    model = tiny_model(config_class, model_class, **more).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    groups = [*GROUPS, (list(range(20, 32)), [[8, 9, 2], [10, 2]])]
    expected = []
    for prompt, answers in groups:
        for answer in answers:
            logits = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
            expected.append(logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).squeeze(1))
    theirs = torch.cat(expected)
    weights = torch.linspace(-1, 1, len(theirs), dtype=torch.float64)
    (theirs * weights).sum().backward()
    before = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    with packing(model):
        found = packed_logps(model, pack(groups)).log_probs
        (found * weights).sum().backward()
    assert torch.allclose(found.double(), theirs, atol=1e-5)  # soft-capped logits go through TRL's kernel, in fp32
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, before[name], atol=1e-5), name


def pair(prompt: int, answer: int) -> TokenPair:
    ids = [range(1, count + 1) for count in (prompt, answer, answer)]
    return TokenPair("0", "prompt", *(tuple(each) for each in ids))


def test_a_window_that_no_layer_names_keeps_a_model_padded() -> None:
    """GPT-Neo masks by itself; a window that is never reached does not matter."""
    config_class, model_class, more = MODELS["Gemma 3"]
    assert packing_problem(tiny_model(config_class, model_class, **more), [pair(5, 4)], torch.float32) == ""
    other = tiny_model(MistralConfig, MistralForCausalLM, sliding_window=None)
    other.config.sliding_window_size = 6  # a key that the model does not hand on
    problem = "its sliding_window_size of 6 is shorter than the longest pair of 9 tokens"
    assert packing_problem(other, [pair(5, 4)], torch.float32) == problem
    assert packing_problem(other, [pair(2, 4)], torch.float32) == ""
    local = {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 4, "num_heads": 4}
    neo = tiny_model(GPTNeoConfig, GPTNeoForCausalLM, **local)
    assert "window_size of 4" in packing_problem(neo, [pair(5, 4)], torch.float32)


def test_what_layers_ask_of_their_attention_is_noted() -> None:
    config_class, model_class, more = MODELS["Gemma 2, every second layer, soft caps"]
    model = tiny_model(config_class, model_class, **more)
    with torch.no_grad(), packing(model), noted_calls() as calls:
        packed_hidden_states(model, pack(GROUPS))
    assert calls == [Call(4, 2, 8, 8, 8**-0.5, 3, 0.5), Call(4, 2, 8, 8, 8**-0.5, None, 0.5)]


def test_attention_sinks_are_refused() -> None:
    states = [torch.zeros(1, n, 3, 8) for n in (4, 2, 2)]
    with pytest.raises(NotImplementedError, match="s_aux"):
        packed_attention(None, *states, None, packed=segments_of([(3, [])]), scaling=1.0, s_aux=torch.zeros(4))
    with pytest.raises(NotImplementedError, match="packed row"):
        packed_attention(None, *states, None, scaling=1.0)


def accurate(q: Tensor, k: Tensor, v: Tensor, segments: Segments, call: Call) -> Tensor:
    """A right kernel: scores in fp32, as flash attention has them, and results in half precision."""
    return by_segment(q.float(), k.float(), v.float(), segments, call).to(q.dtype)


# Kernels that are wrong in one way each, made of the right one.


def shifted(q: Tensor, k: Tensor, v: Tensor, segments: Segments, call: Call) -> Tensor:
    """Causal from the first key on, where queries are fewer than keys: flash attention before 2.1."""
    parts, (queries, keys) = [], zip(*segments.lengths, strict=True)
    for a, b, c in zip(q.split(queries), k.split(keys), v.split(keys), strict=True):
        alone = segments_of([(len(a), [])])
        parts.append(accurate(a, b[: len(a)], c[: len(a)], alone, call))
    return torch.cat(parts)


def all_keys(q: Tensor, k: Tensor, v: Tensor, segments: Segments, call: Call) -> Tensor:
    parts, (queries, keys) = [], zip(*segments.lengths, strict=True)
    for rows in zip(q.split(queries), k.split(keys), v.split(keys), strict=True):
        states = [each.transpose(0, 1) for each in rows]
        more = {"scale": call.scaling, "enable_gqa": True}
        parts.append(torch.nn.functional.scaled_dot_product_attention(*states, **more).transpose(0, 1))
    return torch.cat(parts)


def wider(q, k, v, segments: Segments, call: Call) -> Tensor:
    return accurate(q, k, v, segments, replace(call, window=call.window and call.window + 1))


def narrower(q, k, v, segments: Segments, call: Call) -> Tensor:
    return accurate(q, k, v, segments, replace(call, window=call.window and call.window - 1))


def uncapped(q, k, v, segments: Segments, call: Call) -> Tensor:
    return accurate(q, k, v, segments, replace(call, softcap=None))


def unscaled(q, k, v, segments: Segments, call: Call) -> Tensor:
    return accurate(q, k, v, segments, replace(call, scaling=q.shape[-1] ** -0.5))


def tiled_heads(q, k, v, segments: Segments, call: Call) -> Tensor:
    repeats = call.heads // call.key_heads
    return accurate(q, k.repeat(1, repeats, 1), v.repeat(1, repeats, 1), segments, call)


def lost_gradient(q, k, v, segments: Segments, call: Call) -> Tensor:
    return accurate(q, k.detach() + 0 * k, v, segments, call)


def not_a_number(q, k, v, segments: Segments, call: Call) -> Tensor:
    found = accurate(q, k, v, segments, call)
    return found.index_fill(0, torch.tensor([len(found) - 1]), torch.nan)


def missing(q, k, v, segments: Segments, call: Call) -> Tensor:
    raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.\nException raised from mha_varlen_fwd")


WINDOWED, CAPPED = replace(CALL, window=4096), replace(CALL, softcap=50.0)
WRONG: dict[str, tuple[Any, Call]] = {
    "aligned at the left end": (shifted, CALL),
    "not causal": (all_keys, CALL),
    "a window of one more": (wider, WINDOWED),
    "a window of one less": (narrower, WINDOWED),
    "a window that is ignored": (lambda q, k, v, s, c: accurate(q, k, v, s, replace(c, window=None)), WINDOWED),
    "a soft cap that is ignored": (uncapped, CAPPED),
    "another scale": (unscaled, CALL),
    "heads in another order": (tiled_heads, CALL),
    "a gradient that is lost": (lost_gradient, CALL),
    "a row of NaN": (not_a_number, CALL),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_kernel_is_found(name: str, dtype: torch.dtype) -> None:
    kernel, call = WRONG[name]
    assert "wrongly" in measured_problem(kernel, call, dtype, CPU)
    assert measured_problem(accurate, call, dtype, CPU) == ""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "call",
    [
        Call(8, 8, 64, 64, 64**-0.5),
        Call(8, 2, 128, 128, 128**-0.5, window=4096),
        Call(4, 2, 256, 256, 224**-0.5, window=4096, softcap=50.0),
        Call(4, 4, 192, 128, 0.1147),  # latent attention
        Call(4, 1, 20, 20, 1.0),
    ],
)
def test_a_right_kernel_passes_at_real_widths(call: Call, dtype: torch.dtype) -> None:
    assert measured_problem(accurate, call, dtype, CPU) == ""


def test_a_kernel_that_fails_is_named_in_one_line() -> None:
    problem = measured_problem(missing, CALL, torch.bfloat16, CPU)
    said = "RuntimeError: FlashAttention only supports Ampere GPUs or newer."
    assert problem == f"the kernel for packed attention fails: {said}"


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_kernels_are_compared_in_whatever_pass_they_are_first_called(use_reentrant: bool) -> None:
    """Under gradient checkpointing, autocast, or without gradients; the pass around it goes on as it would."""
    found = []

    def layer(states: Tensor) -> Tensor:
        if not found:
            found.append(measured_problem(accurate, CALL, torch.bfloat16, CPU))
        return (states.sin() * 2).tanh()

    states = torch.linspace(-1, 1, 7, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        checkpoint(layer, states, use_reentrant=use_reentrant).sum().backward()
    again = states.detach().requires_grad_()
    layer(again).sum().backward()
    assert torch.equal(states.grad, again.grad)
    with torch.inference_mode():
        found.append(measured_problem(accurate, CALL, torch.bfloat16, CPU))
    assert found == ["", ""]


def test_what_no_kernel_computes_is_said_before_it_is_run() -> None:
    wide = kernel_problem(replace(CALL, width=512), torch.bfloat16, CPU)
    assert wide == "the model's attention has heads of width 512, the kernel at most 256"
    capped = kernel_problem(CAPPED, torch.bfloat16, CPU)
    assert capped == "the model's attention has a softcap of 50, for which no kernel is installed (flash-attn)"


@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("is_public", [True, False])
def test_torchs_flash_attention_takes_the_arguments(is_public: bool, window: int | None, monkeypatch) -> None:
    """On the meta device, forward and backward: what is called, not what it computes."""
    import harness.train.attention as attention

    if not is_public:
        monkeypatch.setattr(attention, "varlen_attn", lambda: None)
    segments = segments_of([(150, (70, 2)), (5, (20, 0))]).with_tensors(lambda tensor: tensor.to("meta"))
    shapes = ((247, 4, 64), (247, 2, 64), (247, 2, 64))
    states = [torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=True) for shape in shapes]
    out = attend_by(torch_flash, *states, segments, Call(4, 2, 64, 64, 0.125, window))
    assert (out.shape, out.dtype) == ((247, 4, 64), torch.bfloat16)
    gradients = torch.autograd.grad(out, states, torch.empty_like(out))
    assert [each.shape for each in gradients] == [torch.Size(shape) for shape in shapes]


def test_flash_attn_is_called_once_with_its_window_and_soft_cap(monkeypatch) -> None:
    """A stand-in for the package, which needs a GPU: it computes by the arguments that it is given."""
    calls = []

    def flash_attn_varlen_func(
        q, k, v, query_ends, key_ends, max_q, max_k, *, softmax_scale, causal, window_size, softcap
    ):
        calls.append((max_q, max_k, causal, window_size, softcap))
        lengths = tuple(zip(query_ends.diff().tolist(), key_ends.diff().tolist(), strict=True))
        segments = Segments((), torch.arange(len(k)), query_ends, key_ends, lengths)
        call = Call(q.shape[1], k.shape[1], q.shape[2], v.shape[2], softmax_scale, window_size[0] + 1, softcap)
        return accurate(q, k, v, segments, call)

    module = types.ModuleType("flash_attn")
    module.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    assert measured_problem(flash_attn, replace(CAPPED, window=4096), torch.bfloat16, CPU) == ""
    assert calls == [(150, 220, True, (23, 0), 50.0)]


def test_a_row_moves_without_masks() -> None:
    """Masks are for torch's attention alone; they are made there, once for all layers."""
    packed = pack(groups_of([pair(3, 4)], share_prefix=True))
    moved = packed.to("meta")
    tensors = [moved.segments.keys, moved.segments.query_ends, moved.segments.key_ends]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    first, second = packed.segments.masks(None), packed.segments.masks(None)
    assert first is second
    assert first[0][0] is None
    assert first[0][1].shape == (6, 9)
