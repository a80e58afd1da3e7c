"""Policies that think: what is stored as their answer, what beside it, and what their pairs are trained on."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.data.inputs import Inputs
from harness.data.reasoning import AnswerReader
from harness.data.records import EvalPrompt
from harness.data.tokens import ChatFormat
from harness.generate.answers import completion_of
from harness.score.trial_scores import completion_row
from harness.study.files import write_jsonl
from harness.sweep.problems import load_run
from tests.data.test_reasoning import words

PROMPT = EvalPrompt("p", ({"role": "user", "content": "what ?"},), (), None, True, 1)


def answered(said: str, *, asked: str = "what ?", reasoning: str = "auto") -> dict:
    """The stored row of an answer; words are tokens, and `<|stop|>` ends a turn."""
    tokenizer = words("<think>", "</think>", special=True)
    answer, before = (tokenizer.convert_tokens_to_ids(text.split()) for text in (said, asked))
    reader = AnswerReader(tokenizer, reasoning)
    return dict(
        completion_row(completion_of(ChatFormat(tokenizer), PROMPT, answer, "golden", asked=before, reader=reader))
    )


def test_an_answer_and_its_thinking_are_stored_and_counted_apart() -> None:
    row = answered("<think> because of </think> seven . <|stop|>")
    assert (row["completion"], row["tokens"], row["ended"]) == ("seven .", 3, True)
    assert (row["thinking"], row["thinking_tokens"]) == ("because of", 4)


def test_an_answer_without_thinking_has_no_columns_for_it() -> None:
    assert set(answered("seven . <|stop|>")) == {
        "split",
        "prompt_id",
        "prompt",
        "completion",
        "tokens",
        "ended",
        "flags",
    }


@pytest.mark.parametrize(
    ("said", "asked"),
    [("<think> because of", "what ?"), ("<think> because <|stop|>", "what ?"), ("because of", "what ? <think>")],
)
def test_thinking_that_does_not_end_is_an_answer_that_was_cut_off(said: str, asked: str) -> None:
    row = answered(said, asked=asked)
    assert (row["completion"], row["ended"], row["flags"]) == ("", False, ["cut_off"])
    assert row["thinking"].startswith("because")


def test_a_template_that_opens_the_block_leaves_its_end_to_the_answer() -> None:
    row = answered("because </think> seven <|stop|>", asked="what ? <think>")
    assert (row["completion"], row["thinking"], row["tokens"], row["thinking_tokens"]) == ("seven", "because", 2, 2)


def test_keep_stores_what_the_tokenizer_shows() -> None:
    row = answered("<think> because </think> seven <|stop|>", reasoning="keep")
    assert (row["completion"], row["tokens"], "thinking" in row) == ("because seven", 5, False)


@pytest.fixture
def thinking_pairs(tmp_path: Path) -> list[str]:
    """Overrides for pairs of which one differs in its thinking alone."""
    rows = [
        {
            "prompt": "Sort the letters cab",
            "chosen": "<think>a is first</think>abc",
            "rejected": "<think>hm</think>cab",
        },
        {
            "prompt": "Sort the letters fed",
            "chosen": "<think>d is first</think>def",
            "rejected": "<think>hm</think>def",
        },
    ]
    write_jsonl(tmp_path / "train.jsonl", rows)
    write_jsonl(tmp_path / "golden.jsonl", [{"prompt": "Sort the letters ih", "checks": [{"contains": "hi"}]}] * 1)
    write_jsonl(tmp_path / "dev.jsonl", [{"prompt": "Sort the letters kj", "checks": [{"contains": "jk"}]}])
    return ["+method=dpo", *(f"data.{split}={tmp_path / split}.jsonl" for split in ("train", "dev", "golden"))]


def test_drop_takes_the_thinking_out_of_the_pairs_and_counts_those_that_are_then_alike(thinking_pairs) -> None:
    inputs = Inputs()
    dropped, kept = (
        inputs.tokens(load_run([*thinking_pairs, f"generate.reasoning={mode}"])) for mode in ("drop", "keep")
    )
    assert [dropped.chat.tokenizer.decode(row.chosen_ids[:-1]).strip() for row in dropped.train.rows] == ["abc"]
    assert dropped.train.dropped == {"the answers differ in their thinking alone": 1}
    assert len(kept.train.rows) == 2
    assert "first" in kept.chat.tokenizer.decode(kept.train.rows[0].chosen_ids)
