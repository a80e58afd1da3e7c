"""Reasoning: parted from answers in every spelling, from text and from token ids, and out of pairs that are trained on."""

from __future__ import annotations

import time

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from harness.data.reasoning import AnswerReader, Parted, close_token, part, without_reasoning
from harness.data.records import Pair

SPELLINGS = {
    "think": "<think>\nthe sum is 7\n</think>\n\nSeven.",
    "capitals": "<THINK>the sum is 7</THINK>Seven.",
    "thinking": "<thinking>the sum is 7</thinking> Seven.",
    "thought": "<thought>the sum is 7</thought>\nSeven.",
    "reasoning": "<reasoning>the sum is 7</reasoning>Seven.",
    "Magistral": "[THINK]the sum is 7[/THINK]Seven.",
    "Kimi": "◁think▷the sum is 7◁/think▷Seven.",
    "Seed": "<seed:think>the sum is 7</seed:think>Seven.",
    "bars": "<|think|>the sum is 7<|/think|>Seven.",
    "Command A": "<|START_THINKING|>the sum is 7<|END_THINKING|><|START_RESPONSE|>Seven.<|END_RESPONSE|>",
    "Gemma 4": "<|channel>thought\nthe sum is 7\n<channel|>Seven.",
    "gpt-oss": "<|channel|>analysis<|message|>the sum is 7<|end|>"
    "<|start|>assistant<|channel|>final<|message|>Seven.<|return|>",
    "gpt-oss without special tokens": "analysisthe sum is 7assistantfinalSeven.",
    "Granite": "Here is my thought process:\nthe sum is 7\n\nHere is my response:\nSeven.",
    "with an attribute": '<think lang="en">the sum is 7</think>Seven.',
    "with a tag around the answer": "<think>the sum is 7</think>\n<answer>\nSeven.\n</answer>",
    "begun in the prompt": "the sum is 7\n</think>\n\nSeven.",
    "begun in the prompt, on one line": "the sum is 7</think>Seven.",
    "after an invisible mark": "\ufeff\n<think>the sum is 7</think>Seven.",
}


@pytest.mark.parametrize("text", SPELLINGS.values(), ids=SPELLINGS)
def test_every_spelling_is_parted(text: str) -> None:
    found = part(text)
    assert (found.answer, found.thinking, found.closed) == ("Seven.", "the sum is 7", True)


@pytest.mark.parametrize(
    "text",
    [
        "The <think> mark begins a block and </think> ends it.",
        "Write `<think>` first, and `</think>` last.",
        "```html\n<think>\nreason\n</think>\n```\nThat is the format.",
        "Close it with the </think> mark.",
        "analysis of the poem: it rhymes",
        "I think </b> is a tag.",
        "Here is my thought process: none.",
        "<answer>Seven.</answer>",
        "Sure.\n<think>too late to be an opening</think>\nYes.",
        "",
    ],
)
def test_a_mark_in_a_sentence_or_in_code_is_text(text: str) -> None:
    assert part(text) == Parted(text)


def test_several_blocks_are_cut_where_they_begin_a_line_or_a_sentence() -> None:
    found = part("<think>a</think>\n<think>b</think>\nFirst.\n<think>c</think>\nThen use <think> as `<think>`.")
    assert (found.answer, found.thinking) == ("First.\nThen use <think> as `<think>`.", "a\n\nb\n\nc")


@pytest.mark.parametrize(
    "text", ["<think>and so on", "[THINK]", "<|channel|>analysis<|message|>We", "<think>a</think>\n<think>b"]
)
def test_a_block_that_does_not_end_is_an_answer_that_was_cut_off(text: str) -> None:
    found = part(text)
    assert (found.answer, found.closed) == ("", False)
    assert found.spans[-1][1] == len(text)


def test_an_empty_block_leaves_the_answer_alone() -> None:
    assert part("<think>\n\n</think>\n\nYes.").answer == "Yes."


def test_an_answer_begins_inside_of_the_block_that_its_prompt_opens() -> None:
    prompt = "<|user|>Is it?<|assistant|><think>\n"
    assert part("Hm. </think> sure", before=prompt).answer == "sure"
    assert part("Hm, it goes on", before=prompt) == Parted("", "Hm, it goes on", closed=False, spans=((0, 14),))
    assert part("It is.", before="<|assistant|><think>\n\n</think>\n\n") == Parted("It is.")


@pytest.mark.parametrize(
    "unit",
    ["<think>", "</think>", "x </think> ", "`</think>", "<think>a</think>\n", "<|channel|>", "analysisx", "```", " "],
)
def test_hostile_text_is_parted_in_no_time(unit: str) -> None:
    start = time.process_time()
    part(unit * (100_000 // len(unit)))
    part("<think>a</think>" + unit * (100_000 // len(unit)))
    assert time.process_time() - start < 10  # a second, on a machine ten times slower


WORDS = ["what", "?", "because", "of", "seven", ".", "<|system|>", "<|user|>", "<|bot|>", "<|stop|>"]


def words(*marks: str, special: bool) -> PreTrainedTokenizerFast:
    """A tokenizer of words with marks of reasoning, special tokens or plain added ones."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*WORDS, "[UNK]"])}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    found = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="<|stop|>")
    found.add_tokens(list(marks), special_tokens=special)
    return found


class TestTokenIds:
    @pytest.mark.parametrize("special", [True, False])
    @pytest.mark.parametrize(("opens", "closes"), [("<think>", "</think>"), ("[THINK]", "[/THINK]")])
    def test_marks_are_found_even_where_they_are_special_tokens(self, opens, closes, special) -> None:
        tokenizer = words(opens, closes, special=special)
        ids = tokenizer.convert_tokens_to_ids([opens, "because", "of", "seven", closes, "seven", "."])
        found, tokens = AnswerReader(tokenizer, "auto").read([0], ids)
        assert (found.answer, found.thinking, tokens) == ("seven .", "because of seven", 5)

    def test_channels_of_special_tokens_are_read(self) -> None:
        marks = ["<|channel|>", "<|message|>", "<|start|>", "<|end|>", "analysis", "final", "assistant"]
        tokenizer = words(*marks[:4], special=True)
        tokenizer.add_tokens(marks[4:])
        said = ["<|channel|>", "analysis", "<|message|>", "because", "<|end|>", "<|start|>", "assistant", "<|channel|>"]
        ids = tokenizer.convert_tokens_to_ids([*said, "final", "<|message|>", "seven"])
        found, _ = AnswerReader(tokenizer, "auto").read([0], ids)
        assert (found.answer.strip(), found.thinking) == ("seven", "because")

    def test_the_prompts_ids_tell_that_the_answer_begins_inside(self) -> None:
        tokenizer = words("<think>", "</think>", special=True)
        asked = tokenizer.convert_tokens_to_ids(["what", "?", "<think>"])
        ids = tokenizer.convert_tokens_to_ids(["because", "</think>", "seven"])
        found, tokens = AnswerReader(tokenizer, "auto").read(asked, ids)
        assert (found.answer, found.thinking, tokens) == ("seven", "because", 2)
        assert not AnswerReader(tokenizer, "auto").read(asked, ids[:1])[0].closed

    def test_the_close_mark_of_a_vocabulary_is_known(self) -> None:
        tokenizer = words("[THINK]", "[/THINK]", special=True)
        assert tokenizer.convert_ids_to_tokens(close_token(tokenizer)) == "[/THINK]"
        assert close_token(words(special=False)) is None

    def test_keep_changes_nothing(self) -> None:
        tokenizer = words("<think>", "</think>", special=False)
        ids = tokenizer.convert_tokens_to_ids(["<think>", "because", "</think>", "seven"])
        assert AnswerReader(tokenizer, "keep").read([0], ids) == (Parted("<think> because </think> seven"), 0)

    def test_a_lone_close_mark_is_text_for_auto_where_no_token_speaks_for_it(self) -> None:
        tokenizer = words(special=False)
        tokenizer.add_tokens(["so", "</reasoning>"])
        ids = tokenizer.convert_tokens_to_ids(["so", "</reasoning>", "seven"])
        auto, drop = (AnswerReader(tokenizer, mode).read([0], ids)[0] for mode in ("auto", "drop"))
        assert auto.answer == "so </reasoning> seven"
        assert drop.answer in ("seven", "so </reasoning> seven")


def pair(chosen: str, rejected: str) -> Pair:
    said = [({"role": "assistant", "content": text},) for text in (chosen, rejected)]
    return Pair("p", ({"role": "user", "content": "Is it?"},), *said, True, 1)


def test_thinking_is_taken_out_of_both_answers_of_a_pair() -> None:
    pairs = [
        pair("<think>hm</think>Yes.", "No."),
        pair("<think>hm</think>Yes.", "<think>well</think>\nYes."),
        pair("<think>hm, it is", "No."),
        pair("Yes.", "No."),
    ]
    kept, dropped = without_reasoning(pairs)
    assert [(p.chosen[0]["content"], p.rejected[0]["content"]) for p in kept] == [("Yes.", "No.")] * 2
    assert dropped == {"the answers differ in their thinking alone": 1, "an answer is nothing but thinking": 1}


def test_a_key_of_the_turn_that_templates_render_as_thinking_goes_too() -> None:
    turns = [({"role": "assistant", "content": text, "reasoning_content": "hm"},) for text in ("Yes.", "No.")]
    kept, _ = without_reasoning([Pair("p", ({"role": "user", "content": "Is it?"},), *turns, True, 1)])
    assert kept[0].chosen == ({"role": "assistant", "content": "Yes."},)
