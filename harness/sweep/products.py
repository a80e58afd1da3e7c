"""Matrix products of training: a model's matrices and pairs of token ids -> the floating-point operations they need.

The one count of the harness: `plan=true`, `harness.bench` and the check for a GPU take it from here. It has no
recomputation and no padding (PaLM's model FLOPs utilisation, arXiv 2204.02311, appendix B), so that seconds times a
measured rate over it say how far a loop is from the least that it must do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.data.tokens import TokenPair

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Shape:
    """What a token is multiplied with in a model.

    Attributes:
        layers: weights of the layers' matrices; of a mixture of experts those that one token meets.
        head: weights of the head.
        sides: inputs plus outputs of the linear layers, summed: times the rank, the weights of adapters on all of them.
        attention: width of the queries (heads times their width), summed over the layers.
    """

    layers: int
    head: int
    sides: int
    attention: int


@dataclass(frozen=True)
class Work:
    """How much of a model a pass over pairs runs.

    Attributes:
        tokens: that go through the layers.
        predicted: rows that go through the head.
        attended: pairs of a query and a key that it attends to.
    """

    tokens: int
    predicted: int
    attended: int


def shape_of(model: PreTrainedModel) -> Shape:
    """Count the matrices of a causal language model, which may be on the meta device or hold adapters.

    Tables of embeddings are looked up and not multiplied; adapters are left out.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    config = model.config.get_text_config()
    head = model.get_output_embeddings()
    layers = sides = 0
    for name, module in model.named_modules():
        if module is head or isinstance(module, nn.Embedding) or "lora_" in name:
            continue
        matrices = [p for p in module.parameters(recurse=False) if p.ndim == 2]
        layers += sum(p.numel() for p in matrices)
        if isinstance(module, nn.Linear | Conv1D):
            sides += sum(module.weight.shape)
        layers += sum(_met(p.shape, config) for p in module.parameters(recurse=False) if p.ndim == 3)
    heads = getattr(config, "num_attention_heads", None) or 0  # a model of state spaces has none
    width = heads * (getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0))
    return Shape(layers, head.weight.numel(), sides, config.num_hidden_layers * width)


def _met(shape: Sequence[int], config: PretrainedConfig) -> int:
    """Return how many weights of stacked experts, shape (experts, outputs, inputs), one token meets; else 0."""
    chosen = getattr(config, "num_experts_per_tok", None)
    return chosen * shape[1] * shape[2] if chosen and shape[0] > 1 else 0


def shape_of_config(config: PretrainedConfig) -> Shape:
    """Count the matrices of the model that a config describes; no weight is made."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return shape_of(AutoModelForCausalLM.from_config(config))


def needed(rows: Sequence[TokenPair]) -> Work:
    """Return the least work for the log-probs of both answers of each pair: a prompt once, no padding.

    An answer's last token predicts nothing and is left out; sliding windows are not taken off.
    """
    tokens = predicted = attended = 0
    for row in rows:
        prompt = len(row.prompt_ids)
        tokens += prompt
        attended += _causal(prompt)
        for answer in (row.chosen_ids, row.rejected_ids):
            queries = len(answer) - 1
            tokens += queries
            attended += queries * prompt + _causal(queries)
            predicted += len(answer)
    return Work(tokens, predicted, attended)


def padded(rows: Sequence[TokenPair], *, micro_batch_size: int) -> Work:
    """Return the work of a trainer that runs both rows of each pair at the width of its micro-batch's longest row.

    Args:
        rows: the pairs in the order of training.
        micro_batch_size: pairs per forward pass.
    """
    tokens = attended = 0
    for start in range(0, len(rows), micro_batch_size):
        batch = rows[start : start + micro_batch_size]
        width = max(row.length for row in batch)
        tokens += 2 * len(batch) * width
        attended += 2 * len(batch) * _causal(width)
    return Work(tokens, needed(rows).predicted, attended)


def _causal(length: int) -> int:
    return length * (length + 1) // 2


def forward_flops(shape: Shape, work: Work, *, rank: int = 0) -> float:
    """Return the operations of a forward pass: 2 for each weight and token, 4 for each unit of width and attended pair.

    Args:
        shape: the model's matrices.
        work: what is run.
        rank: of adapters on all linear layers; 0: none.
    """
    weights = shape.layers + rank * shape.sides
    return 2.0 * weights * work.tokens + 2.0 * shape.head * work.predicted + 4.0 * shape.attention * work.attended


def training_flops(shape: Shape, work: Work, *, rank: int, recomputed: bool = False) -> float:
    """Return the operations of a forward and a backward pass.

    A frozen matrix has the gradient of its input alone (2 + 2 operations a weight and token), a trained one its own
    as well (2 + 4); attention has 4 + 8 a unit of width and attended pair. The gradient of the first layer's input is
    counted, though frozen embeddings need none: below 1% of a model with 32 layers.

    Args:
        shape: the model's matrices.
        work: what is run.
        rank: of adapters on all linear layers; 0: every weight is trained.
        recomputed: the layers run forward twice (gradient checkpointing); needed products have it False.
    """
    forward = forward_flops(shape, work, rank=rank)
    frozen = shape.layers * work.tokens + shape.head * work.predicted
    trained = rank * shape.sides * work.tokens if rank else frozen
    backward = 2.0 * (frozen if rank else 0) + 4.0 * trained + 8.0 * shape.attention * work.attended
    again = forward - 2.0 * shape.head * work.predicted if recomputed else 0.0
    return forward + backward + again
