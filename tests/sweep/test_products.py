"""The count of products: by hand, and by torch's counter of operations on the packed engine with PEFT's adapters."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    Qwen3Config,
)

from harness.data.tokens import TokenPair
from harness.sweep.products import (
    Shape,
    Work,
    forward_flops,
    needed,
    padded,
    shape_of,
    shape_of_config,
    training_flops,
)
from harness.train.attention import packing
from harness.train.packed import groups_of, pack, packed_logps

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}
DENSE = {
    "llama": LlamaConfig(**SMALL),
    "llama, tied": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "heads wider than the model": Qwen3Config(**SMALL, head_dim=24),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64),
}
ROWS = (
    TokenPair("a", "a", (1, 2, 3, 4), (5, 6, 7), (8, 9)),
    TokenPair("b", "b", (1, 2), (3, 4, 5, 6, 7, 8), (9,)),
)


def products(counter: FlopCounterMode) -> tuple[int, int]:
    """Return the counted operations of matrices with rows, and of attention's stacked matrices."""
    found = counter.get_flop_counts()["Global"]
    names = {str(op): count for op, count in found.items()}
    rows = sum(count for name, count in names.items() if "mm" in name and "bmm" not in name)
    return rows, sum(count for name, count in names.items() if "bmm" in name)


def test_work_by_hand() -> None:
    """Pair a: 4 + 2 + 1 tokens, 3 + 2 rows of the head; attended 10 + (2*4 + 3) + (4 + 1) = 26."""
    assert needed(ROWS[:1]) == Work(7, 5, 26)
    assert needed(ROWS) == Work(7 + 7, 5 + 7, 26 + 3 + (5 * 2 + 15))


def test_padded_work_by_hand() -> None:
    """Rows of 7 and 8 tokens: alone each has its own width, together both have the longer one."""
    assert padded(ROWS, micro_batch_size=1) == Work(2 * (7 + 8), 12, 2 * (28 + 36))
    assert padded(ROWS, micro_batch_size=2) == Work(4 * 8, 12, 4 * 36)


def test_operations_by_hand() -> None:
    shape, work = Shape(layers=10, head=3, sides=7, attention=5), Work(tokens=2, predicted=4, attended=6)
    assert forward_flops(shape, work) == 2 * 10 * 2 + 2 * 3 * 4 + 4 * 5 * 6
    adapters = 2 * 7  # of rank 2
    expected = 4 * 10 * 2 + 4 * 3 * 4 + 6 * adapters * 2 + 12 * 5 * 6
    assert training_flops(shape, work, rank=2) == expected
    again = 2 * (10 + adapters) * 2 + 4 * 5 * 6  # the layers, and not the head
    assert training_flops(shape, work, rank=2, recomputed=True) == expected + again
    assert training_flops(shape, work, rank=0) == 6 * 10 * 2 + 6 * 3 * 4 + 12 * 5 * 6


@pytest.mark.parametrize("name", DENSE)
def test_the_products_of_adapters_are_those_that_torch_counts(name: str) -> None:
    model = AutoModelForCausalLM.from_config(DENSE[name])
    shape, work, rank = shape_of(model), needed(ROWS), 3
    policy = get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear", fan_in_fan_out=name == "gpt2"))
    policy.enable_input_require_grads()  # the count has the gradient of the first layer's input
    assert rank * shape.sides == sum(p.numel() for p in policy.parameters() if p.requires_grad)
    assert shape_of(model) == shape, "adapters are not counted"
    counter = FlopCounterMode(display=False)
    with packing(model), counter:
        packed_logps(model, pack(groups_of(ROWS, share_prefix=True))).log_probs.sum().backward()
    assert products(counter)[0] == training_flops(shape, replace(work, attended=0), rank=rank)


@pytest.mark.parametrize("name", DENSE)
def test_the_products_of_full_fine_tuning_are_those_that_torch_counts(name: str) -> None:
    model = AutoModelForCausalLM.from_config(DENSE[name], attn_implementation="eager")
    counter = FlopCounterMode(display=False)
    with counter:
        model(input_ids=torch.arange(1, 8)[None]).logits.sum().backward()
    assert products(counter)[0] == training_flops(shape_of(model), Work(7, 7, 0), rank=0)


@pytest.mark.parametrize("name", DENSE)
def test_the_products_of_attention_are_those_that_torch_counts(name: str) -> None:
    """Eager attention computes the whole square; the count has the pairs of query and key that are attended to."""
    model = AutoModelForCausalLM.from_config(DENSE[name], attn_implementation="eager")
    attention = Shape(0, 0, 0, shape_of(model).attention)
    counter = FlopCounterMode(display=False)
    with counter:
        model(input_ids=torch.arange(1, 8)[None]).logits.sum().backward()
    assert products(counter)[1] == training_flops(attention, Work(0, 0, 7 * 7), rank=0)
    assert forward_flops(attention, Work(0, 0, 7 * 7)) * 3 == products(counter)[1]


@pytest.mark.parametrize("name", DENSE)
def test_a_config_alone_has_the_shape_of_its_model(name: str) -> None:
    assert shape_of_config(DENSE[name]) == shape_of(AutoModelForCausalLM.from_config(DENSE[name]))


def test_a_token_meets_the_chosen_experts_alone() -> None:
    config = MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2)
    dense = shape_of_config(LlamaConfig(**SMALL)).layers
    expert = 3 * SMALL["hidden_size"] * SMALL["intermediate_size"]
    router = 4 * SMALL["hidden_size"]
    assert shape_of_config(config).layers == dense + SMALL["num_hidden_layers"] * (expert + router)


def test_a_model_of_state_spaces_has_no_heads() -> None:
    shape = shape_of_config(MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=64))
    assert shape.attention == 0
    assert shape.layers > 0


def test_positions_and_embeddings_are_looked_up_and_not_multiplied() -> None:
    shape = shape_of_config(Gemma3TextConfig(**SMALL, head_dim=8))
    assert shape.head == SMALL["vocab_size"] * SMALL["hidden_size"]
    assert shape.layers == shape_of_config(LlamaConfig(**SMALL)).layers
