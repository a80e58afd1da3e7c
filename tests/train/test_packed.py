"""Packed pairs: the same numbers as one answer at a time, with less computed, and a fallback where a model cannot."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

import harness.train.packed
from harness.data.inputs import tokens_of
from harness.data.tokens import TokenPair
from harness.sweep.problems import load_run
from harness.train.base import load_base
from harness.train.logps import _padded_logps, pair_logps
from harness.train.packed import answer_sums, pack, packed_logps, packing, packing_problem, token_logps
from tests.conftest import tiny_model

CONFIG = load_run(["+method=dpo", "data.max_train_pairs=12"])


def rows() -> tuple[TokenPair, ...]:
    return tokens_of(CONFIG).train.rows


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


def test_each_token_is_computed_once_and_the_head_sees_answers_only() -> None:
    """Counted at the model itself: its input's tokens, and the rows that its head multiplies."""
    model, pairs = load_base(CONFIG), rows()
    computed: list[int] = []
    model.model.register_forward_hook(
        lambda module, args, kwargs, output: computed.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    unique = sum(len(row.prompt_ids) + len(row.chosen_ids) + len(row.rejected_ids) for row in pairs)
    prompts = sum(len(row.prompt_ids) for row in pairs)
    pair_logps(model, pairs, pad_id=0, desc="")
    assert computed  # the probe of whether it can be packed, once for a model
    computed.clear()
    shared = pair_logps(model, pairs, pad_id=0, desc="")
    assert sum(computed) == unique - 2 * len(pairs)  # an answer's last token predicts nothing
    computed.clear()
    apart = pair_logps(model, pairs, pad_id=0, desc="", share_prefix=False)
    assert sum(computed) == unique + prompts - 2 * len(pairs)
    assert torch.allclose(shared, apart, atol=1e-4)
    packed = pack([(row.prompt_ids, [row.chosen_ids, row.rejected_ids]) for row in pairs])
    assert len(packed.predicting) == len(packed.targets) == sum(len(r.chosen_ids) + len(r.rejected_ids) for r in pairs)


def test_packed_and_padded_log_probs_agree() -> None:
    model = load_base(CONFIG)
    padded = _padded_logps(model, rows(), pad_id=0, desc="")
    assert torch.allclose(pair_logps(model, rows(), pad_id=0, desc=""), padded, atol=1e-4)


def test_a_window_that_is_wide_enough_packs_and_a_narrow_one_falls_back_to_padding() -> None:
    """Mistral's sliding window: beyond it the packed attention would see too much, so it is not used."""
    row = TokenPair("a", "p", tuple(range(1, 13)), (5, 6, 7, 2), (8, 2))
    expected = {}
    for window in (64, 8):
        model = tiny_model(MistralConfig, MistralForCausalLM, sliding_window=window)
        padded = _padded_logps(model, [row], pad_id=0, desc="")
        problem = packing_problem(model, [row], lambda model, rows: _padded_logps(model, rows, pad_id=0, desc=""))
        assert bool(problem) == (window == 8)
        assert "sliding_window" in problem or window == 64
        assert torch.allclose(pair_logps(model, [row], pad_id=0, desc=""), padded, atol=1e-4)
        expected[window] = padded
    assert not torch.allclose(expected[64], expected[8], atol=1e-3)  # the window matters here


def test_a_model_whose_packed_log_probs_differ_falls_back_to_padding(monkeypatch) -> None:
    model = tiny_model()
    monkeypatch.setattr(
        harness.train.packed, "answer_sums", lambda logps, packed: answer_sums(logps, packed) + torch.tensor([0.0, 0.1])
    )
    row = TokenPair("a", "p", (1, 2, 3), (5, 6, 2), (8, 2))
    problem = packing_problem(model, [row], lambda model, rows: _padded_logps(model, rows, pad_id=0, desc=""))
    assert problem == "its log-probs differ by 0.05 nats a token from the padded ones"
