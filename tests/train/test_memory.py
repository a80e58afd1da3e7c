"""What training needs: counted beside torch's own record of what autograd keeps; checkpointing by what is free."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from harness.config.footprint import layer_bytes
from harness.config.schema import LeversConfig, Tuning
from harness.data.plan import BatchPlan
from harness.data.tokens import TokenPair
from harness.study.errors import NoRoomError
from harness.sweep.problems import load_run
from harness.train.adapter import fuse_adapters
from harness.train.attention import packing
from harness.train.memory import (
    free_memory,
    largest_load,
    load_of,
    model_shape,
    needs_checkpointing,
    out_of_memory_as_no_room,
    plan_of,
)
from harness.train.packed import groups_of, pack
from tests.conftest import load_base, tokens_of

CONFIG = load_run(["+method=dpo", "data.max_train_pairs=12"])
ROWS = [TokenPair("a", "a", (1, 2), (3,), (4,)), TokenPair("b", "b", (1,), (2, 3, 4), (5, 6))]
WIDTHS = {
    "narrow": {"hidden_size": 512, "intermediate_size": 1792, "num_attention_heads": 8, "num_key_value_heads": 2},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8},
}
LAYERS = [
    ("lora", "fused", "fp32"), ("lora", "PEFT's", "fp32"), ("lora", "fused", "bf16"), ("lora", "PEFT's", "bf16"),
    ("full", "", "fp32"), ("full", "", "bf16"),
]  # fmt: skip


def test_the_load_of_a_micro_batch_by_hand() -> None:
    packed = [largest_load(CONFIG, ROWS, BatchPlan((0, 1, 1, 0), 2, micro), "packed") for micro in (1, 2)]
    assert packed == [(6, 5, False), (10, 7, False)]
    assert load_of(CONFIG, ROWS, "padded") == (16, 7, False), "two answers to each prompt, as long as the longest"
    assert load_of(load_run(["+method=simpo"]), ROWS, "padded") == (16, 16, True), "TRL's CPOTrainer holds all logits"
    assert load_of(CONFIG, ROWS, "alone") == (13, 13, True)


def layer_of(width: str, tuning: str, kernels: str, precision: str) -> tuple[LlamaForCausalLM, Any]:
    """Return a model of one layer, and the layer, with an adapter where one is trained."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=256, num_hidden_layers=1, tie_word_embeddings=False, **WIDTHS[width])
    model = LlamaForCausalLM(config)
    if tuning == "lora":
        model = model.to(torch.bfloat16) if precision == "bf16" else model
        get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
        assert fuse_adapters(model) == 7 if kernels == "fused" else True
    return model, model.model.layers[0]


def kept_bytes(model: Any, layer: Any, precision: str) -> tuple[int, int]:
    """Return what autograd keeps of a layer that runs packed pairs, and their number of tokens.

    Each tensor's memory counts once. Weights are no activations, nor are their copies in bf16.
    """
    sizes = ((60, 70, 50), (90, 40, 80))
    rows = [TokenPair(str(i), str(i), *((5,) * size for size in lengths)) for i, lengths in enumerate(sizes)]
    packed = pack(groups_of(rows, share_prefix=True))
    is_bf16 = precision == "bf16"
    hidden = model.model.embed_tokens(packed.input_ids).detach().requires_grad_()
    rotary = model.model.rotary_emb(hidden, packed.position_ids)
    outside = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *rotary]}
    copies = {frozenset(p.shape) for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in outside and frozenset(tensor.shape) not in copies:
            kept[storage.data_ptr()] = storage
        return tensor

    precise = torch.autocast("cpu", torch.bfloat16) if is_bf16 else contextlib.nullcontext()
    with packing(model), precise, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        held = layer(hidden, position_embeddings=rotary, packed=packed.segments)
    assert held.requires_grad
    return sum(storage.nbytes() for storage in kept.values()), packed.input_ids.numel()


@pytest.mark.parametrize(("tuning", "kernels", "precision"), LAYERS)
@pytest.mark.parametrize("width", ["narrow", pytest.param("8B", marks=pytest.mark.slow)])
def test_what_a_layer_keeps_is_counted_within_a_tenth(width: str, tuning: str, kernels: str, precision: str) -> None:
    model, layer = layer_of(width, tuning, kernels, precision)
    levers = LeversConfig(fuse_adapters=kernels == "fused")
    train = replace(CONFIG.train, tuning=Tuning(tuning), levers=levers)
    kept, tokens = kept_bytes(model, layer, precision)
    expected = tokens * layer_bytes(train, model_shape(model), bf16=precision == "bf16")
    print(
        f"{width} {tuning} {kernels} {precision}: kept {kept / tokens:.0f} bytes a token, expected {expected / tokens}"
    )
    assert kept == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(("gigabytes", "needed"), [(64, False), (0.05, True)])
def test_checkpointing_is_used_only_where_the_free_memory_asks_for_it(
    gigabytes: float, needed: bool, monkeypatch
) -> None:
    rows = [*tokens_of(CONFIG).train.rows] * 40
    config = load_run(["+method=dpo", "train.batch_size=480", "train.micro_batch_size=480", "train.epochs=1"])
    free = SimpleNamespace(available=int(gigabytes * 2**30), total=2**40)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    model, plan = load_base(CONFIG), plan_of(config, rows)
    assert needs_checkpointing(config, model, rows, plan, way="packed", bf16=False) is needed


@pytest.mark.parametrize(("available", "total", "needed"), [(0.01, 256, False), (256, 0.05, True)])
def test_processes_decide_alike_by_all_of_the_memory(available: float, total: float, needed: bool, monkeypatch) -> None:
    """What is free differs between them, and one that computes again what another kept would wait for it forever."""
    rows = [*tokens_of(CONFIG).train.rows] * 40
    keys = ["train.batch_size=480", "train.micro_batch_size=240", "train.epochs=1"]
    config = load_run(["+method=dpo", *keys, "accelerate=ddp", "accelerate.num_processes=2"])
    found = SimpleNamespace(available=int(available * 2**30), total=int(total * 2**30))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: found)
    model, plan = load_base(CONFIG), plan_of(config, rows)
    assert needs_checkpointing(config, model, rows, plan, way="packed", bf16=False) is needed


def test_full_fine_tuning_counts_its_gradients_and_optimiser(monkeypatch) -> None:
    """A model of 0.9M weights: 11 MB of gradients and AdamW's states, which an adapter does not need."""
    rows = tokens_of(CONFIG).train.rows[:1]
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10 * 10**6, total=2**40))
    found = {}
    for tuning in ("lora", "full"):
        config = load_run(["+method=dpo", "train.batch_size=1", "train.micro_batch_size=1", f"train.tuning={tuning}"])
        plan = plan_of(config, rows)
        found[tuning] = needs_checkpointing(config, load_base(CONFIG), rows, plan, way="packed", bf16=False)
    assert found == {"lora": False, "full": True}


def test_the_free_memory_of_a_cpu_is_the_machines() -> None:
    free, total = free_memory(torch.device("cpu"))
    assert 0 < free < total == psutil.virtual_memory().total


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."), True),
        (RuntimeError("Failed, NCCL error: unhandled cuda error, Cuda failure 2 'out of memory'"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"), False),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (ValueError("the pair is about running out of memory"), False),
    ],
)  # fmt: skip
def test_memory_that_runs_out_in_training_asks_for_a_smaller_micro_batch(error: Exception, is_memory: bool) -> None:
    with pytest.raises(NoRoomError if is_memory else type(error)), out_of_memory_as_no_room():
        raise error
