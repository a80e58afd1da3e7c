"""Tokenisation: once, for both arms; the prompt's ids are shared, each answer ends its turn exactly once."""

from __future__ import annotations

import pytest

from harness.embedded import study_dir
from harness.records import Pair, UsageError
from harness.tokens import ChatFormat, TokenPair, load_chat_format, tokenise_pairs

# Like ChatML, which writes white space behind the end of turn (there a newline; this tokenizer has none).
CHATML = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def chat(template: str | None = None, *, use_template: bool = True) -> ChatFormat:
    """Return the embedded tokenizer, with another template if asked."""
    loaded = load_chat_format(study_dir(), revision=None, template=None, auto=True)
    if template is not None:
        loaded.tokenizer.chat_template = template or None
    return ChatFormat(loaded.tokenizer, use_template=use_template)


def pair(prompt="sort cab", chosen="abc", rejected="cba", *, conversational=True, before=()) -> Pair:
    messages = tuple({"role": role, "content": text} for role, text in [*before, ("user", prompt)])
    return Pair(
        pair_id="p",
        prompt=messages,
        chosen=({"role": "assistant", "content": chosen},),
        rejected=({"role": "assistant", "content": rejected},),
        conversational=conversational,
        row=1,
    )


def only_row(given: Pair, format_: ChatFormat) -> TokenPair:
    tokenised = tokenise_pairs([given], format_, max_length=128)
    assert tokenised.dropped == {}
    return tokenised.rows[0]


def test_an_answer_ends_in_one_end_of_turn() -> None:
    format_ = chat()
    row = only_row(pair(), format_)
    assert format_.tokenizer.decode(row.prompt_ids) == "<|user|>sort cab<|assistant|>"
    assert format_.tokenizer.decode(row.chosen_ids) == "abc<|end|>"
    assert format_.tokenizer.decode(row.rejected_ids) == "cba<|end|>"


def test_what_a_template_puts_behind_the_end_of_turn_is_cut() -> None:
    format_ = chat(CHATML)
    assert format_.tokenizer.decode(only_row(pair(), format_).chosen_ids) == "abc<|end|>"


def test_an_end_of_turn_written_in_the_data_is_not_doubled() -> None:
    format_ = chat(CHATML)
    assert format_.tokenizer.decode(only_row(pair(chosen="abc<|end|>"), format_).chosen_ids) == "abc<|end|>"


def test_a_template_without_an_end_of_turn_gets_one() -> None:
    format_ = chat(CHATML.replace("<|end|>", ""))
    assert format_.tokenizer.decode(only_row(pair(), format_).chosen_ids).endswith("<|end|>")


def test_plain_text_goes_through_the_template_where_there_is_one() -> None:
    templated, plain = chat(), chat(use_template=False)
    assert templated.tokenizer.decode(only_row(pair(conversational=False), templated).prompt_ids).startswith("<|user|>")
    assert plain.tokenizer.decode(only_row(pair(conversational=False), plain).prompt_ids) == "sort cab"


def test_conversations_without_a_template_are_refused() -> None:
    with pytest.raises(UsageError, match=r"no chat template.*model\.chat_template"):
        only_row(pair(), chat(""))


def test_a_template_that_renders_the_prompt_in_two_ways_is_refused() -> None:
    two_ways = "{% if add_generation_prompt %}short<|assistant|>{% else %}" + CHATML + "{% endif %}"
    with pytest.raises(UsageError, match=r"renders the prompt alone differently"):
        only_row(pair(), chat(two_ways))


def test_bos_stands_once() -> None:
    format_ = chat("<|system|><|system|>" + CHATML)
    format_.tokenizer.bos_token = "<|system|>"
    ids = only_row(pair(), format_).prompt_ids
    assert ids.count(format_.tokenizer.bos_token_id) == 1


def test_earlier_turns_and_the_system_message_are_part_of_the_prompt() -> None:
    format_ = chat()
    before = [("system", "be short"), ("user", "sort ba"), ("assistant", "ab")]
    shown = format_.tokenizer.decode(only_row(pair(before=before), format_).prompt_ids)
    assert shown.count("<|end|>") == 1
    assert shown.endswith("ab<|end|><|user|>sort cab<|assistant|>")


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (pair(chosen="a" * 200), "longer than data.max_length=128"),
        (pair(prompt="a" * 200), "longer than data.max_length=128"),
        (pair(chosen=""), "answer has no tokens"),
        (pair(rejected="abc<|end|>"), "answers are the same tokens"),
    ],
)
def test_drops_for_both_arms_and_says_why(given: Pair, reason: str) -> None:
    tokenised = tokenise_pairs([pair(), given], chat(), max_length=128)
    assert len(tokenised.rows) == 1
    assert tokenised.dropped == {reason: 1}


def test_a_pair_of_exactly_the_maximal_length_stays() -> None:
    row = only_row(pair(), chat())
    assert tokenise_pairs([pair()], chat(), max_length=row.length).dropped == {}
    assert tokenise_pairs([pair()], chat(), max_length=row.length - 1).rows == ()


def test_the_hash_sees_ids_order_and_mask() -> None:
    format_ = chat()
    first, second = pair(), pair("sort bca")
    whole = tokenise_pairs([first, second], format_, max_length=128)
    assert whole.sha256 == tokenise_pairs([first, second], format_, max_length=128).sha256
    assert whole.sha256 != tokenise_pairs([second, first], format_, max_length=128).sha256
    moved = type(whole)((TokenPair("p", "q", (1, 2), (3,), (4,)),), {})
    assert moved.sha256 != type(whole)((TokenPair("p", "q", (1,), (2, 3), (4,)),), {}).sha256
