"""How much work a training run needs at least, and how fast this machine multiplies matrices."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from harness.tokens import TokenPair


def needed_flops(model_config: Any, rows: Sequence[TokenPair], *, lora_rank: int) -> float:
    """Return the floating-point operations of one LoRA pass over the rows, each token computed once.

    `4 N_blk D + 4 N_head D_c + 6 N_lora D + 8 L h Σ s²/2`: forward and backward through frozen weights, the head on
    answer tokens only, adapters with their own gradient, and causal attention (PaLM, arXiv 2204.02311, appendix B,
    counts 6 N D for training all weights; frozen ones need no gradient of their own). With rank 0 half of it is the
    forward pass alone, which is what DPO's reference needs.

    Args:
        model_config: the model's config.
        rows: the pairs of one pass; the prompt of a pair counts once.
        lora_rank: of the adapters on all linear layers.
    """
    text = model_config.get_text_config()
    tokens = sum(len(row.prompt_ids) + len(row.chosen_ids) + len(row.rejected_ids) for row in rows)
    answers = sum(len(row.chosen_ids) + len(row.rejected_ids) for row in rows)
    squares = sum(
        len(row.prompt_ids) ** 2 / 2
        + sum(len(answer) * (len(row.prompt_ids) + len(answer) / 2) for answer in (row.chosen_ids, row.rejected_ids))
        for row in rows
    )
    blocks = 4 * block_parameters(text) * tokens
    head = 4 * text.vocab_size * text.hidden_size * answers
    adapters = 6 * lora_parameters(text, lora_rank) * tokens
    return float(blocks + head + adapters + 8 * text.num_hidden_layers * text.hidden_size * squares)


def lora_parameters(text: Any, rank: int) -> int:
    """Count the weights of adapters on all linear layers of a Llama-like model."""
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    queries, keys = text.num_attention_heads * head_dim, text.num_key_value_heads * head_dim
    shapes = [(text.hidden_size, queries), (text.hidden_size, keys), (text.hidden_size, keys)]
    shapes += [(queries, text.hidden_size)]
    shapes += [(text.hidden_size, text.intermediate_size)] * 2 + [(text.intermediate_size, text.hidden_size)]
    return text.num_hidden_layers * rank * sum(inputs + outputs for inputs, outputs in shapes)


def block_parameters(text: Any) -> int:
    """Count the weights of the matrices in the layers of a Llama-like model."""
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    queries, keys = text.num_attention_heads * head_dim, text.num_key_value_heads * head_dim
    attention = text.hidden_size * (2 * queries + 2 * keys)
    return int(text.num_hidden_layers * (attention + 3 * text.hidden_size * text.intermediate_size))


def matmul_rate(inner: int, outer: int, *, rows: int = 512, seconds: float = 2.0, bf16: bool = False) -> float:
    """Measure this machine's matrix products in FLOP/s, at shapes such as a layer's; on its GPU where it has one."""
    import torch

    is_gpu = torch.cuda.is_available()
    kind: Any = {"device": "cuda" if is_gpu else "cpu", "dtype": torch.bfloat16 if bf16 else torch.float32}
    a, b = torch.randn(rows, inner, **kind), torch.randn(inner, outer, **kind)
    for _ in range(3):
        a @ b
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        a @ b
        if is_gpu:
            torch.cuda.synchronize()
        count += 1
    return 2.0 * rows * inner * outer * count / (time.perf_counter() - start)
