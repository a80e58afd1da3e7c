"""What `torch.compile` of the elementwise parts would give the training loop: norms, rotary embedding, SwiGLU.

Made for `loop_profile.py`. The same forward and backward passes run with torch's operators and with compiled ones, in
turn, so that both meet the same machine, on one thread, in seconds of CPU. Nothing of it is in the harness.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch
from peft import get_peft_model
from torch.nn.functional import silu
from transformers import PreTrainedModel
from transformers.models.llama import modeling_llama

from harness.bench.runs import STEP_PAIRS, Bench
from harness.sweep.products import needed, training_flops
from harness.train.adapter import adapter_config, fuse_adapters
from harness.train.base import load_base
from harness.train.packed import ATTENTION, Packed, groups_of, pack, packed_logps

ROUNDS = 3
Tensor = torch.Tensor


def _norm(weight: Tensor, states: Tensor, epsilon: float) -> Tensor:
    wide = states.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return weight * wide.to(states.dtype)


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    return silu(gate) * up


def compiled() -> contextlib.ExitStack:
    """Return a context in which Llama's layers compute their elementwise parts by compiled functions."""
    norm, gated, rotated = (
        torch.compile(function, dynamic=True)  # one compilation for all lengths
        for function in (_norm, _gated, modeling_llama.apply_rotary_pos_emb)
    )

    def norm_forward(module: torch.nn.Module, states: Tensor) -> Tensor:
        return norm(module.weight, states, module.variance_epsilon)

    def mlp_forward(module: torch.nn.Module, states: Tensor) -> Tensor:
        return module.down_proj(gated(module.gate_proj(states), module.up_proj(states)))

    stack = contextlib.ExitStack()
    stack.enter_context(patch.object(modeling_llama.LlamaRMSNorm, "forward", norm_forward))
    stack.enter_context(patch.object(modeling_llama.LlamaMLP, "forward", mlp_forward))
    stack.enter_context(patch.object(modeling_llama, "apply_rotary_pos_emb", rotated))
    return stack


def _seconds(model: PreTrainedModel, batches: list[Packed]) -> float:
    began = time.process_time()
    for packed in batches:
        packed_logps(model, packed).log_probs.sum().backward()
        model.zero_grad()
    return time.process_time() - began


def _rate(inner: int, outer: int, count: int = 100) -> float:
    """Return products in FLOP per second of CPU."""
    a, b = torch.randn(512, inner), torch.randn(inner, outer)
    began = time.process_time()
    for _ in range(count):
        a @ b
    return 2.0 * 512 * inner * outer * count / (time.process_time() - began)


def compare(bench: Bench, most: int = 8) -> str:
    """Return the finding as a paragraph: seconds over needed products for both, and the seconds of compiling.

    Args:
        bench: the model and its pairs.
        most: number of pairs that are run.
    """
    rows = bench.rows[:most]
    torch.set_num_threads(1)
    model = load_base(bench.config, Path(bench.model_dir))
    policy = get_peft_model(model, adapter_config(bench.config, model))
    fuse_adapters(model)
    model.set_attn_implementation(ATTENTION)
    policy.train()
    starts = range(0, len(rows), STEP_PAIRS)
    batches = [pack(groups_of(rows[start : start + STEP_PAIRS], share_prefix=True)) for start in starts]
    flops = training_flops(bench.shape, needed(rows), rank=bench.config.train.lora_rank)
    plain: list[float] = []
    fused: list[float] = []
    rates: list[float] = []
    _seconds(model, batches[:1])
    began = time.perf_counter()
    with compiled(), patch.dict(os.environ, TORCHINDUCTOR_FORCE_DISABLE_CACHES="1"):
        _seconds(model, batches)
    first = time.perf_counter() - began
    began = time.perf_counter()
    with compiled():
        _seconds(model, batches)
    compiling = first - (time.perf_counter() - began)
    sizes = model.config.hidden_size, model.config.intermediate_size
    for _ in range(ROUNDS):
        rates.append(_rate(*sizes))
        plain.append(_seconds(model, batches))
        with compiled():  # what is compiled already is found again
            fused.append(_seconds(model, batches))
    least = flops / median(rates)
    ratios = [a / b for a, b in zip(fused, plain, strict=True)]
    return (
        f"Forward and backward passes over {len(rows)} pairs, {ROUNDS} rounds in turn, on one thread, in CPU seconds, "
        f"without optimiser and trainer: {median(plain):.1f} s with torch's operators ({median(plain) / least:.2f} "
        f"times the needed products at {median(rates) / 1e9:.0f} GFLOP/s), {median(fused):.1f} s with norms, rotary "
        f"embedding and SwiGLU compiled ({median(fused) / least:.2f} times), a ratio of {median(ratios):.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f}). The first pass, which compiles, took {compiling:.0f} s longer. "
        "The head's softmax and the sums of LoRA are not compiled."
    )
