"""What a template or a tokenizer takes away from a study's texts is refused by name, or counted and said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from harness.data.inputs import Inputs, Tokens
from harness.data.records import Pair
from harness.data.tokens import NOT_ASKED, TWICE, ChatFormat, tokenise_pairs
from harness.data.written import left_out
from harness.study.errors import UsageError
from tests.data.test_inputs import TURNS, config_of, rows
from tests.data.test_tokens import FAMILIES, build_tokenizer, load, only_row, pair, phi


def findings(pairs: list[Pair], format_: ChatFormat) -> list[str]:
    """Return the warnings on a split."""
    found = tokenise_pairs(pairs, format_, max_length=128)
    assert found.readback is not None
    return [finding.detail for finding in found.readback.findings("train")]


def with_tokenizer(changed: Any) -> ChatFormat:
    """Return a format with a tokenizer of Llama 2's kind after a change of it."""
    tokenizer = build_tokenizer(FAMILIES["llama-2"])
    tokenizer.chat_template = FAMILIES["llama-2"].template.replace("INST", "inst")
    changed(tokenizer.backend_tokenizer)
    return ChatFormat(tokenizer)


def normalise(*more: Any) -> Any:
    from tokenizers import normalizers

    def change(backend: Any) -> None:
        backend.normalizer = normalizers.Sequence([*more, backend.normalizer])

    return change


# Turns that a template leaves out.

ANSWERS_ALONE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|assistant|>\n{{ m['content'] }}<|end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.mark.parametrize(
    "template",
    [
        ANSWERS_ALONE,
        "<|user|>\nsort bca<|end|>\n" + ANSWERS_ALONE,  # the prompt of another row
        ANSWERS_ALONE.replace("['role'] == 'assistant'", "['role'] != 'user'"),
        "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] if m['role'] == 'assistant' else m['text'] }}<|end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    ],
)
def test_pairs_whose_user_the_template_leaves_out_are_dropped_with_the_way_out(template: str) -> None:
    tokenised = tokenise_pairs([pair(), pair("sort cba")], load("phi-3", template=template), max_length=128)
    assert tokenised.dropped == {NOT_ASKED: 2}
    assert "leaves out or rewrites the user's turn" in NOT_ASKED
    assert "model.chat_template" in NOT_ASKED


@pytest.mark.parametrize(
    "content",
    ["m['content'][:10]", "m['content'].split('.')[0]", "m['content'] | upper | replace('SORT CAB', 'sort cab')"],
)
def test_only_pairs_whose_prompt_is_cut_or_rewritten_are_dropped(content: str) -> None:
    whole = f"({content}) if m['role'] == 'user' else m['content']"
    tokenised = tokenise_pairs([pair(), pair("sort cab. be short and kind")], phi(whole), max_length=128)
    assert tokenised.dropped == {NOT_ASKED: 1}


def test_a_study_without_the_users_turns_is_refused(tmp_path: Path) -> None:
    silent = TURNS.replace("{{ m['content'] }}", "{{ m['content'] if m['role'] == 'assistant' }}")
    with pytest.raises(UsageError, match="no training pair is left after tokenisation: the chat template leaves out"):
        Inputs().tokens(config_of(tmp_path, silent, rows()))


def test_evaluation_prompts_that_are_cut_are_counted(tmp_path: Path) -> None:
    given = rows()
    given["golden"] = [
        {"prompt": [{"role": "user", "content": text}], "checks": [{"contains": "a"}]}
        for text in ("sort acb", "sort acbd")
    ]
    cuts = TURNS.replace("{{ m['content'] }}", "{{ m['content'][:8] }}")
    (warning,) = Inputs().tokens(config_of(tmp_path, cuts, given)).warnings
    assert warning.startswith(
        "prompts of golden: in 1 of 2 rows the chat template leaves out or rewrites the user's turn"
    )
    assert "'sort acbd'" in warning


@pytest.mark.parametrize(("kind", "text"), [("the system turn", "be kind"), ("an earlier turn", "bcd")])
def test_other_turns_that_the_template_leaves_out_are_counted(kind: str, text: str) -> None:
    before = [("system", "be kind"), ("user", "sort dcb"), ("assistant", "bcd")]
    drops = phi().tokenizer.chat_template.replace("for m in messages", f"for m in messages if m['content'] != '{text}'")
    (said,) = findings([pair(before=before), pair()], load("phi-3", template=drops))
    assert said.startswith(f"train: in 1 of 2 rows the chat template leaves out or rewrites {kind}, as '{text}'")
    assert "model.chat_template" in said


def test_a_template_that_keeps_the_last_turn_alone_is_counted() -> None:
    last = phi().tokenizer.chat_template.replace(
        "for m in messages", "for m in (messages[-1:] if add_generation_prompt else messages[-2:])"
    )
    before = [("user", "sort ba"), ("assistant", "ab")]
    (said,) = findings([pair(before=before)], load("phi-3", template=last))
    assert "leaves out or rewrites an earlier turn, as 'sort ba'" in said


def test_white_space_and_thinking_of_earlier_answers_may_go() -> None:
    before = [("user", "sort\n\nba"), ("assistant", "<think>hm</think>ab")]
    thinks = phi("(m['content'].split('</think>')[-1] if not loop.last else m['content']) | replace('\\n', ' ')")
    assert findings([pair(before=before)], thinks) == []
    assert left_out([{"role": "user", "content": " a b\n"}], "<|user|>ab<|end|>") == {}


# Answers that a template writes twice.


@pytest.mark.parametrize(
    "content",
    [
        "m['content'] + ' ' + m['content']",
        "m['content'] + '<|end|>\\n' + m['content']",
        "m['content'] + (m['content'] if m['content'] == 'abc' else '')",
        "'again: ' + m['content'] + ' says ' + m['content']",
    ],
)
def test_a_pair_whose_answer_is_written_twice_is_dropped(content: str) -> None:
    template = phi(f"({content}) if m['role'] == 'assistant' else m['content']")
    tokenised = tokenise_pairs([pair()], template, max_length=128)
    assert tokenised.dropped == {TWICE: 1}


@pytest.mark.parametrize("answer", ["e", "n", "<", "end", "abab", "think", "aa"])
def test_an_answer_that_stands_in_the_templates_own_words_is_not_twice(answer: str) -> None:
    thinks = phi("('<think>\n\n</think>\n\n' if m['role'] == 'assistant' else '') + m['content']")
    only_row(pair(chosen=answer, rejected="cba"), thinks)


# Text that a tokenizer loses.


def test_text_that_the_tokenizer_does_not_know_is_counted_with_a_word() -> None:
    format_ = load("llama-2")
    (said,) = findings([pair(), pair(chosen="ein Grüßchen"), pair("sort 漢字")], format_)
    assert said.startswith("train: in 2 of 3 rows the tokenizer writes text as <unk> (id 0), as 'Grüßchen'; give the")


def test_where_all_rows_hold_unknown_text_the_study_is_refused() -> None:
    with pytest.raises(UsageError, match=r"train: in 2 of 2 rows the tokenizer writes text as <unk> \(id 0\), as 'ä'"):
        findings([pair(chosen="ä b"), pair(chosen="ö c")], load("llama-2"))


def test_a_mark_for_unknown_text_in_the_data_itself_is_text() -> None:
    assert findings([pair(chosen="the <unk> of cab"), pair()], load("llama-2")) == []


def test_an_end_of_turn_that_is_also_the_mark_for_unknown_text_is_no_loss() -> None:
    """As in GPT-2, whose one special token is everything."""
    tokenizer = build_tokenizer(FAMILIES["chatml"])
    tokenizer.chat_template = FAMILIES["chatml"].template
    tokenizer.unk_token = "<|im_end|>"
    assert findings([pair(), pair(chosen="Grüße, 漢字 ½ …")], ChatFormat(tokenizer)) == []


def test_small_letters_in_place_of_capitals_are_counted() -> None:
    from tokenizers import normalizers

    (said,) = findings([pair(), pair(chosen="the Cab")], with_tokenizer(normalise(normalizers.Lowercase())))
    assert said.startswith(
        "train: 1 of 2 rows do not read back from their token ids as they are: the tokenizer changes"
    )
    assert "capital and small letters, as in 'Cab'" in said


def test_characters_that_are_dropped_or_changed_are_counted() -> None:
    from tokenizers import normalizers

    for change, text, word in (
        (normalise(normalizers.NFKC()), "one ﬁne cab", "ﬁne"),
        (normalise(normalizers.Replace("#", "")), "cab #1", "#1"),
        (normalise(normalizers.NFD(), normalizers.StripAccents()), "the café", "café"),
    ):
        (said,) = findings([pair(), pair(chosen=text)], with_tokenizer(change))
        assert f"the tokenizer drops or changes characters, as in '{word}'" in said


def test_a_tokenizer_without_a_mark_for_unknown_text_drops_it_and_that_is_counted() -> None:
    import json

    from tokenizers import models

    def change(backend: Any) -> None:
        plain = json.loads(backend.to_str())
        backend.model = models.BPE(plain["model"]["vocab"], [tuple(m) for m in plain["model"]["merges"]])

    (said,) = findings([pair(), pair(chosen="cab 漢 abc")], with_tokenizer(change))
    assert "the tokenizer drops or changes characters, as in '漢'" in said


def test_canonically_equal_text_and_white_space_are_no_loss() -> None:
    from tokenizers import normalizers

    composes = ChatFormat(build_tokenizer(FAMILIES["chatml"]))
    composes.tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    composes.tokenizer.chat_template = FAMILIES["chatml"].template
    assert findings([pair(chosen="the cafe\u0301"), pair(chosen="  abc \n\n 1")], ChatFormat(composes.tokenizer)) == []


def test_every_family_reads_back_what_it_knows() -> None:
    for name in FAMILIES:
        assert findings([pair(), pair(chosen='It\'s: (a) 1, 2; "c"!')], load(name)) == [], name


def test_a_study_says_what_its_tokenizer_loses(tmp_path: Path) -> None:
    given = rows()
    given["train"][0]["chosen"] = [{"role": "assistant", "content": "größer"}]
    given["golden"].append({"prompt": [{"role": "user", "content": "sortiere ß"}], "checks": [{"contains": "a"}]})
    tokens: Tokens = Inputs().tokens(config_of(tmp_path, TURNS, given))
    first, second = tokens.warnings
    assert first.startswith("train: in 1 of 3 rows the tokenizer writes text as <|unk|> (id 1), as 'größer'")
    assert "golden" in second
