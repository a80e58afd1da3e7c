"""Generation: batched by length, rows leave when their answers have ended, and every answer is what it would be alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from transformers import MistralConfig, MistralForCausalLM

from harness.generate.answers import ROUND_TOKENS, generate_completions
from harness.sweep.problems import load_run
from tests.conftest import borrowed_base, splits_of, tiny_model, tokens_of

CONFIG = load_run(["+method=dpo", "data.max_golden_prompts=48", "generate.max_new_tokens=40"])


class RowCounter:
    """Counts the rows of every forward call of a model."""

    def __init__(self, model: Any) -> None:
        self.rows: list[int] = []
        self.handle = model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: Any, args: Any, kwargs: Any) -> None:
        self.rows.append(len(kwargs["input_ids"]))


@pytest.fixture
def base() -> Any:
    with borrowed_base(CONFIG) as model:
        yield model


def answers(model: Any, **decoding: Any) -> list[str]:
    prompts = splits_of(CONFIG).golden_prompts
    settings = replace(CONFIG.generate, **decoding)
    chat = tokens_of(CONFIG).chat
    return [c.completion for c in generate_completions(model, chat, prompts, split="golden", decoding=settings)]


def test_every_answer_is_that_of_its_prompt_alone(base: Any) -> None:
    together, alone = answers(base, batch_size=48), answers(base, batch_size=1)
    assert together == alone
    assert len(set(together)) > 20


def test_rows_leave_the_batch_when_their_answers_have_ended(base: Any) -> None:
    counter = RowCounter(base)
    answers(base, batch_size=48)
    counter.handle.remove()
    assert counter.rows[0] == 48
    assert counter.rows[ROUND_TOKENS] < 48, "after the first round some rows must have left"
    assert counter.rows == sorted(counter.rows, reverse=True)


def test_generation_stops_when_all_answers_have_ended(base: Any) -> None:
    counter = RowCounter(base)
    answers(base, batch_size=48, max_new_tokens=1000)
    counter.handle.remove()
    assert len(counter.rows) < 500


def test_the_limit_holds_over_the_rounds(base: Any) -> None:
    prompts, chat = splits_of(CONFIG).golden_prompts, tokens_of(CONFIG).chat
    for limit in (1, ROUND_TOKENS - 1, ROUND_TOKENS, ROUND_TOKENS + 1):
        settings = replace(CONFIG.generate, max_new_tokens=limit)
        found = generate_completions(base, chat, prompts, split="golden", decoding=settings)
        assert max(c.tokens for c in found) <= limit
        assert all(c.ended or c.tokens == limit for c in found)


def test_sampling_is_the_same_with_the_same_seed(base: Any) -> None:
    first, again, other = (answers(base, temperature=1.0, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


@pytest.mark.parametrize("window", [4, 64])
def test_a_model_with_a_sliding_window_answers_as_it_does_alone(window: int) -> None:
    vocab_size = len(tokens_of(CONFIG).chat.tokenizer)
    model = tiny_model(
        MistralConfig, MistralForCausalLM, vocab_size=vocab_size, sliding_window=window, initializer_range=0.3
    )
    assert answers(model, batch_size=48) == answers(model, batch_size=1)
