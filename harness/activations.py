"""Does training fit into memory without gradient checkpointing? Asked of the model and the plan, so that the answer is
the same for every arm of a study."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from harness.plan import BatchPlan
from harness.tokens import TokenPair

USABLE_SHARE = 0.6  # of the machine's memory, for activations; the rest is for weights, optimiser and the system


def activation_bytes(model_config: Any, num_tokens: int, itemsize: int) -> int:
    """Estimate what a forward pass over `num_tokens` keeps for the backward pass of a gated-MLP transformer.

    A layer keeps about 8 tensors of the hidden size, keys and values twice, and 4 of the MLP's size, for each token.
    """
    text = model_config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    kept = 8 * text.hidden_size + 4 * heads * head_dim + 4 * inner
    return int(num_tokens * text.num_hidden_layers * kept * itemsize)


def largest_micro_batch(rows: Sequence[TokenPair], plan: BatchPlan, *, share_prefix: bool) -> int:
    """Return the number of tokens of the largest micro-batch."""
    sizes = [
        (1 if share_prefix else 2) * len(row.prompt_ids) + len(row.chosen_ids) + len(row.rejected_ids) for row in rows
    ]
    step = plan.micro_batch_size
    return max(sum(sizes[i] for i in plan.order[start : start + step]) for start in range(0, len(plan.order), step))


def needs_checkpointing(model: Any, rows: Sequence[TokenPair], plan: BatchPlan, *, share_prefix: bool) -> bool:
    """Return True where the largest micro-batch does not fit: on a GPU into its memory, else into the machine's."""
    import psutil
    import torch

    total = psutil.virtual_memory().total
    if model.device.type == "cuda":
        total = torch.cuda.get_device_properties(model.device).total_memory
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    tokens = largest_micro_batch(rows, plan, share_prefix=share_prefix)
    return activation_bytes(model.config, tokens, model.dtype.itemsize) > USABLE_SHARE * total - weights
