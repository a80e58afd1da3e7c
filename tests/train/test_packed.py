"""Packed batches and the head: the same log-probs, gradients and metrics as one answer at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from harness.sweep.problems import load_run
from harness.train.attention import packing
from harness.train.packed import pack, packed_logps, token_logps
from tests.conftest import load_base, tiny_model

CONFIG = load_run(["+method=dpo", "data.max_train_pairs=12"])


def alone(model: Any, prompt, answer) -> torch.Tensor:
    """The definition: one prompt with one answer through the whole model."""
    logits = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).squeeze(1)


GROUPS = [([5, 6, 7], [[8, 9, 2], [10, 2]]), ([3], [[4, 2], [11, 12, 13, 14, 2]]), ([1, 2, 3, 4], [[9], [8, 7]])]


@pytest.mark.parametrize("tied", [False, True])
def test_log_probs_and_gradients_equal_one_answer_at_a_time(tied: bool) -> None:
    """In float64, so that a token that attends to a wrong one would show: prompts of one token, answers of one token."""
    model = tiny_model(tie_word_embeddings=tied).double()
    weights = torch.linspace(
        -1, 1, sum(len(answer) for _, answers in GROUPS for answer in answers), dtype=torch.float64
    )
    expected = torch.cat([alone(model, prompt, answer) for prompt, answers in GROUPS for answer in answers])
    (expected * weights).sum().backward()
    before = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    with packing(model):
        found = packed_logps(model, pack(GROUPS)).log_probs
        (found * weights).sum().backward()
    assert torch.allclose(found.double(), expected, atol=1e-6)
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, before[name], atol=1e-6), name


def test_the_head_equals_the_definition_with_its_gradient_and_trls_metrics() -> None:
    model = load_base(CONFIG).requires_grad_(False)
    hidden = torch.randn(300, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(300) % model.config.vocab_size
    weights = torch.linspace(-1, 1, 300)
    ours, theirs = hidden.clone().requires_grad_(), hidden.clone().double().requires_grad_()
    found = token_logps(model, ours, targets, metrics=True)
    logits = theirs @ model.lm_head.weight.double().t()
    logps = logits.log_softmax(-1)
    expected = logps.gather(1, targets[:, None]).squeeze(1)
    (found.log_probs * weights).sum().backward()
    (expected * weights).sum().backward()
    assert torch.allclose(found.log_probs.double(), expected, atol=1e-5)
    assert torch.allclose(ours.grad.double(), theirs.grad, atol=1e-5)
    assert torch.allclose(found.entropy.double(), -(logps.exp() * logps).sum(-1), atol=1e-5)
    assert torch.allclose(found.mean_logits.double(), logits.mean(-1), atol=1e-5)
    assert torch.equal(found.is_top1, logits.argmax(-1) == targets)


def test_a_trained_head_gets_its_gradient() -> None:
    model, targets = tiny_model(), torch.arange(40)
    hidden = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    token_logps(model, hidden, targets).log_probs.sum().backward()
    ours = model.lm_head.weight.grad.clone()
    model.zero_grad()
    (hidden @ model.lm_head.weight.t()).log_softmax(-1).gather(1, targets[:, None]).sum().backward()
    assert torch.allclose(ours, model.lm_head.weight.grad, atol=1e-5)


def test_a_head_that_fsdp_has_split_is_gathered_and_its_gradient_split_again(tmp_path: Path) -> None:
    """One process here; `tests/train/sharded.py` has two."""
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{tmp_path}/store")
    try:
        model = tiny_model()
        hidden, targets = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)), torch.arange(5)
        expected = token_logps(model, hidden, targets).log_probs
        expected.sum().backward()
        whole = model.lm_head.weight.grad
        mesh = init_device_mesh("cpu", (1,))
        model.lm_head.weight = torch.nn.Parameter(distribute_tensor(model.lm_head.weight.detach(), mesh, [Shard(0)]))
        found = token_logps(model, hidden, targets).log_probs
        assert torch.allclose(found, expected)
        found.sum().backward()
        gradient = model.lm_head.weight.grad
        assert isinstance(gradient, DTensor)
        assert torch.allclose(gradient.full_tensor(), whole)
    finally:
        torch.distributed.destroy_process_group()


def test_log_probs_of_a_head_in_bf16_are_numbers_of_fp32() -> None:
    """In bf16 a log-prob of 10 nats would be off by 0.03."""
    model = tiny_model().to(torch.bfloat16).requires_grad_(False)
    hidden = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16).requires_grad_()
    found = token_logps(model, hidden, torch.arange(5)).log_probs
    logits = (hidden @ model.lm_head.weight.t()).float()
    assert found.dtype == torch.float32
    assert torch.allclose(found, logits.log_softmax(-1).diagonal(), atol=1e-5)
    found.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.bfloat16
