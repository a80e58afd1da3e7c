"""Tokenisation: once, for both arms; the prompt's ids are shared, each answer ends its turn exactly once."""

from __future__ import annotations

import copy
import itertools
import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from harness.config.paths import embedded_dir as study_dir
from harness.data.records import Given, Pair
from harness.data.tokens import ChatFormat, TokenPair, load_chat_format, tokenise_pairs
from harness.study.errors import UsageError

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


# The same for the tokenizers that people have: small ones, trained here, built as those of the named families are.

CORPUS = [
    "sort cab",
    "sort the letters of cab: abc",
    "be short",
    "you are a helpful assistant",
    "abc cba 1 2 3",
    "\n\n",
]
BYTE_LEVEL_CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nyou are a helpful assistant<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HEADERS = (
    "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + ' ' }}"
    "{{ eos_token }}{% else %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
)
TURNS = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else 'user' }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
TWO_ENDS = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"


@dataclass(frozen=True)
class Family:
    """How a family of checkpoints tokenises.

    Attributes:
        special: control tokens; the first is BOS where `bos` says so.
        eos: the tokenizer's EOS.
        end: the token that ends the assistant's turn in the template.
        stops: the other ids at which generation_config.json stops.
        bos: BOS token of the tokenizer, if it has one.
        adds_bos: the tokenizer's own encoding begins with BOS.
        split: how text is cut into words before the BPE, where that is not GPT-2's way.
        spaces: white space is a `\u2581` before the word (sentencepiece), not a byte.
    """

    template: str
    special: tuple[str, ...]
    eos: str
    end: str
    stops: tuple[str, ...] = ()
    bos: str | None = None
    adds_bos: bool = False
    split: str | None = None
    spaces: bool = False


FAMILIES = {
    "chatml": Family(BYTE_LEVEL_CHATML, ("<|im_start|>", "<|im_end|>"), "<|im_end|>", "<|im_end|>"),
    "chatml, BOS is the start of turn": Family(
        BYTE_LEVEL_CHATML, ("<|im_start|>", "<|im_end|>"), "<|im_end|>", "<|im_end|>", bos="<|im_start|>"
    ),
    "llama-3": Family(
        HEADERS,
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"),
        "<|end_of_text|>",
        "<|eot_id|>",
        stops=("<|eot_id|>",),
        bos="<|begin_of_text|>",
        adds_bos=True,
        split=WORDS,
    ),
    "llama-3, template without BOS": Family(
        HEADERS.replace("{{ bos_token }}", ""),
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"),
        "<|end_of_text|>",
        "<|eot_id|>",
        stops=("<|eot_id|>",),
        bos="<|begin_of_text|>",
        adds_bos=True,
        split=WORDS,
    ),
    "llama-2": Family(INST, ("<s>", "</s>"), "</s>", "</s>", bos="<s>", adds_bos=True, spaces=True),
    "gemma": Family(
        TURNS,
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        "<eos>",
        "<end_of_turn>",
        stops=("<end_of_turn>",),
        bos="<bos>",
        adds_bos=True,
    ),
    "phi-3": Family(
        TWO_ENDS,
        ("<s>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"),
        "<|endoftext|>",
        "<|end|>",
        stops=("<|end|>", "<|assistant|>"),
        bos="<s>",
    ),
}


@cache
def load(name: str, *, template: str | None = None) -> ChatFormat:
    """Build the family's tokenizer, write it as a checkpoint has it, and load that."""
    family = FAMILIES[name]
    fast = build_tokenizer(family)
    fast.chat_template = family.template if template is None else template
    with TemporaryDirectory() as folder:
        fast.save_pretrained(folder)
        stops = fast.convert_tokens_to_ids([family.eos, *family.stops])
        Path(folder, "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
        return load_chat_format(folder, revision=None, template=None, auto=True)


@pytest.mark.parametrize(
    ("written", "message"),
    [('{"eos_token_id": "2"}', "eos_token_id='2'; allowed: the id of a token"), ("{nope", "json is not readable")],
)
def test_a_generation_config_that_says_nothing_of_use_is_refused(written: str, message: str, tmp_path: Path) -> None:
    build_tokenizer(FAMILIES["phi-3"]).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(written)
    with pytest.raises(UsageError, match=message):
        load_chat_format(tmp_path, revision=None, template=None, auto=True)


def build_tokenizer(family: Family) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>" if family.spaces else None))
    if family.spaces:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse()])
    else:
        words = [pre_tokenizers.Split(Regex(family.split), behavior="isolated")] if family.split else []
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [*words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not family.split)]
        )
        tokenizer.decoder = decoders.ByteLevel()
    special = [*(["<unk>"] if family.spaces else []), *family.special]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=[*map(chr, range(33, 127))] if family.spaces else pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if family.adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A", special_tokens=[(family.bos, tokenizer.token_to_id(family.bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=family.bos,
        eos_token=family.eos,
        unk_token="<unk>" if family.spaces else None,
        additional_special_tokens=list(family.special),
        clean_up_tokenization_spaces=False,
    )


every_family = pytest.mark.parametrize("name", FAMILIES)


@every_family
def test_a_family_is_what_it_is_called(name: str) -> None:
    family, tokenizer = FAMILIES[name], load(name).tokenizer
    assert (tokenizer.bos_token, tokenizer.eos_token) == (family.bos, family.eos)
    assert (tokenizer("abc")["input_ids"][0] == tokenizer.bos_token_id) is family.adds_bos
    assert len(tokenizer("abc", add_special_tokens=False)["input_ids"]) < 4


@every_family
def test_training_ids_are_those_of_the_whole_conversation_in_the_template(name: str) -> None:
    """What is trained on is what the tokenizer makes of prompt and answer in one, up to the end of the turn."""
    format_, given = load(name), pair()
    row = only_row(given, format_)
    for answer, ids in ((given.chosen, row.chosen_ids), (given.rejected, row.rejected_ids)):
        ours = [*row.prompt_ids, *ids]
        theirs = whole_ids(format_, given, answer)
        if FAMILIES[name].adds_bos and theirs[0] != format_.tokenizer.bos_token_id:
            theirs = [format_.tokenizer.bos_token_id, *theirs]
        assert ours == theirs[: len(ours)]
        rest = format_.tokenizer.decode([i for i in theirs[len(ours) :] if i not in format_.stop_ids])
        assert not rest.strip()


def whole_ids(format_: ChatFormat, given: Pair, answer: tuple) -> list[int]:
    return format_.tokenizer.apply_chat_template([*given.prompt, *answer], tokenize=True, return_dict=False)


@every_family
def test_each_answer_has_one_end_of_turn_and_it_is_the_templates(name: str) -> None:
    format_ = load(name)
    row = only_row(pair(), format_)
    for ids in (row.chosen_ids, row.rejected_ids):
        assert [i for i in ids if i in format_.stop_ids] == [ids[-1]]
        assert format_.tokenizer.decode(ids[-1]) == FAMILIES[name].end


@every_family
@pytest.mark.parametrize("conversational", [True, False])
@pytest.mark.parametrize("use_template", [True, False])
def test_bos_stands_once_where_the_tokenizer_or_the_template_puts_it(
    name: str, conversational: bool, use_template: bool
) -> None:
    family = FAMILIES[name]
    format_ = ChatFormat(load(name).tokenizer, load(name).stop_ids, use_template=use_template)
    bos = format_.tokenizer.bos_token_id
    row = only_row(pair(conversational=conversational), format_)
    answers = [*row.chosen_ids, *row.rejected_ids]
    assert bos is None or bos not in answers
    if family.adds_bos:
        assert row.prompt_ids[0] == bos
        assert row.prompt_ids.count(bos) == 1
    elif bos is not None and not (conversational or use_template):
        assert bos not in row.prompt_ids


def test_generation_and_held_out_pairs_start_from_the_prompt_that_was_trained_on() -> None:
    for name, conversational in itertools.product(FAMILIES, (True, False)):
        format_, given = load(name), pair(conversational=conversational)
        row = only_row(given, format_)
        assert format_.prompt_ids(given.prompt, conversational=conversational) == list(row.prompt_ids)
        assert len({only_row(pair(chosen=answer), format_).prompt_ids for answer in ("abc", " abc", "\n\nabc")}) == 1


@every_family
def test_an_answer_that_merges_with_the_prompt_leaves_the_prompt_alone(name: str) -> None:
    """At "ab|c" the whole text may be one token; generation must start from the ids of "ab" all the same."""
    format_ = ChatFormat(load(name).tokenizer, use_template=False)
    row = only_row(pair("sort ca", "b", "cb", conversational=False), format_)
    assert format_.tokenizer.decode(row.prompt_ids, skip_special_tokens=True).strip() == "sort ca"
    assert format_.tokenizer.decode(row.chosen_ids, skip_special_tokens=True).strip() == "b"
    assert len(row.chosen_ids) >= 2


def test_a_header_that_merges_with_the_answer_is_trained_on_as_it_is_generated_from() -> None:
    """GPT-2 cuts "\\n\\nabc" into "\\n", "\\n", "abc", and the header alone into "\\n\\n": that one counts."""
    two_lines = BYTE_LEVEL_CHATML.replace("assistant\n{% endif", "assistant\n\n{% endif").replace(
        "{{ m['role'] }}\n", "{{ m['role'] }}\n\n"
    )
    format_, given = load("chatml", template=two_lines), pair()
    row = only_row(given, format_)
    alone = format_.tokenizer.apply_chat_template(
        list(given.prompt), tokenize=True, return_dict=False, add_generation_prompt=True
    )
    assert list(row.prompt_ids) == alone
    assert whole_ids(format_, given, given.chosen)[: len(alone)] != alone
    assert format_.tokenizer.decode(row.chosen_ids) == "abc<|im_end|>"


@every_family
def test_an_end_of_turn_in_the_data_is_the_one_that_the_template_writes(name: str) -> None:
    format_, family = load(name), FAMILIES[name]
    clean = only_row(pair(), format_)
    for written in {family.end, family.eos}:
        assert only_row(pair(chosen="abc" + written), format_).chosen_ids == clean.chosen_ids
        assert only_row(pair(chosen=f"abc{written}\n"), format_).chosen_ids == clean.chosen_ids


@every_family
@pytest.mark.parametrize("place", ["prompt", "chosen", "rejected"])
def test_a_pair_whose_text_contains_a_control_token_is_dropped_and_says_which(name: str, place: str) -> None:
    family = FAMILIES[name]
    side = "prompt" if place == "prompt" else "answer"
    for token in family.special:
        tokenised = tokenise_pairs([pair(**{place: f"cab {token} is"})], load(name), max_length=128)
        assert not tokenised.rows
        assert list(tokenised.dropped) == [f"{side} contains the control token {token}"]


def test_an_answer_that_goes_on_after_an_id_at_which_generation_stops_is_dropped() -> None:
    tokenizer = load("chatml").tokenizer
    stops_at_1 = ChatFormat(tokenizer, tokenizer("1", add_special_tokens=False)["input_ids"])
    tokenised = tokenise_pairs([pair(), pair(chosen="1 2 3")], stops_at_1, max_length=128)
    assert len(tokenised.rows) == 1
    assert tokenised.dropped == {"answer goes on after an end of turn": 1}


def test_white_space_before_an_end_of_turn_in_the_data_stays() -> None:
    format_ = load("chatml")
    written = only_row(pair(chosen="abc\n<|im_end|>\n"), format_).chosen_ids
    assert format_.tokenizer.decode(written) == "abc\n<|im_end|>"


def test_plain_text_begins_as_the_tokenizer_begins_it_and_does_not_end() -> None:
    """Whatever the tokenizer puts around a text: what is in front stays, an EOS behind it would end the prompt."""
    from tokenizers import processors

    tokenizer = copy.deepcopy(load("llama-2").tokenizer)
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<unk>", "<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<unk> <s> $A </s>", special_tokens=special
    )
    row = only_row(pair(conversational=False), ChatFormat(tokenizer, use_template=False))
    assert tokenizer.decode(row.prompt_ids).replace(" ", "") == "<unk><s>sortcab"


def test_control_tokens_in_earlier_turns_drop_the_pair_too() -> None:
    before = [("user", "sort ba"), ("assistant", "ab<|im_end|>")]
    tokenised = tokenise_pairs([pair(before=before)], load("chatml"), max_length=128)
    assert tokenised.dropped == {"prompt contains the control token <|im_end|>": 1}


def test_plain_text_that_has_the_templates_form_already_is_named_with_the_way_out() -> None:
    given = pair("<|im_start|>user\nsort cab<|im_end|>\n<|im_start|>assistant\n", conversational=False)
    tokenised = tokenise_pairs([given], load("chatml"), max_length=128)
    assert tokenised.dropped == {
        "prompt contains the control token <|im_start|> (is it in the template's form already? data.template=never)": 1
    }
    as_it_is = ChatFormat(load("chatml").tokenizer, use_template=False)
    assert only_row(given, as_it_is).prompt_ids == tuple(as_it_is.tokenizer(given.prompt[0]["content"])["input_ids"])
    assert as_it_is.tokenizer.decode(only_row(given, as_it_is).chosen_ids) == "abc<|im_end|>"


def test_an_answer_of_several_turns_ends_each_of_them() -> None:
    format_ = load("chatml")
    turns = [("assistant", "abc"), ("user", "sort cba"), ("assistant", "abc")]
    several = tuple({"role": role, "content": text} for role, text in turns)
    ids = format_.answer_ids(pair().prompt, several, conversational=True)
    shown = format_.tokenizer.decode(ids)
    assert shown == "abc<|im_end|>\n<|im_start|>user\nsort cba<|im_end|>\n<|im_start|>assistant\nabc<|im_end|>"


def test_a_prompt_for_evaluation_is_encoded_as_it_would_be_served() -> None:
    """It cannot be dropped, and is the same for every arm: what the tokenizer makes of it, control tokens and all."""
    format_ = load("chatml")
    given = pair("cab <|im_end|> is").prompt
    theirs = format_.tokenizer.apply_chat_template(
        list(given), tokenize=True, return_dict=False, add_generation_prompt=True
    )
    assert format_.prompt_ids(given, conversational=True) == theirs


def test_a_template_that_never_writes_the_assistants_header_before_the_answer_is_refused() -> None:
    """Otherwise the header would be a part of the answer: trained on, counted in its length, and shown."""
    ignores = BYTE_LEVEL_CHATML.partition("{% if add_generation_prompt %}")[0]
    with pytest.raises(UsageError, match=r"add_generation_prompt.*<\|im_start\|>assistant.*model\.chat_template"):
        only_row(pair(), load("chatml", template=ignores))


def test_a_template_may_open_the_answer_with_more_than_its_generation_prompt() -> None:
    """As one of a model that thinks does: an empty thought before the answer, in whole conversations only."""
    thinks = BYTE_LEVEL_CHATML.replace(
        "{{ m['content'] }}", "{% if loop.last and m['role'] == 'assistant' %}<think>\n\n{% endif %}{{ m['content'] }}"
    )
    format_ = load("chatml", template=thinks)
    assert format_.tokenizer.decode(only_row(pair(), format_).chosen_ids) == "<think>\n\nabc<|im_end|>"


def test_what_a_template_refuses_is_a_user_error_with_its_words() -> None:
    refuses = "{{ raise_exception('no system role') if messages[0]['role'] == 'system' }}" + BYTE_LEVEL_CHATML
    with pytest.raises(UsageError, match=r"chat template.*no system role"):
        only_row(pair(before=[("system", "be short")]), load("chatml", template=refuses))


# What stands in the data reaches the model: the answer unchanged, one end of turn, and what the row gives the template.

NAMED = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ CONTENT }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def phi(content: str = "m['content']", *, end: str = "<|end|>") -> ChatFormat:
    return load("phi-3", template=NAMED.replace("CONTENT", content).replace("<|end|>", end))


@pytest.mark.parametrize(
    ("content", "answer"),
    [
        ("m['content'].split('</think>')[-1]", "<think>\nit is abc\n</think>\n\nabc"),
        ("m['content'].split('</think>')[-1].lstrip()", "a good reason</think>abc"),
        ("m['content'] | lower", "Abc"),
        ("m['content'] | replace('letters', 'Letters')", "the letters of abc"),
        ("m['content'][:20]", "a b c a b c a b c a b c"),
        ("m['content'] | escape", "a < b"),
        ("m['content'] | wordwrap(6)", "sort the letters of cab"),
        ("m['content'] | replace('\\n\\n', '\\n')", "abc\n\n1 2 3"),
        ("'' if '<think>' in m['content'] else m['content']", "<think>abc</think>abc"),
    ],
)
def test_a_pair_whose_answer_the_template_cuts_or_rewrites_is_dropped_with_the_ways_out(
    content: str, answer: str
) -> None:
    tokenised = tokenise_pairs([pair(), pair(chosen=answer)], phi(content), max_length=128)
    assert len(tokenised.rows) == 1
    (reason,) = tokenised.dropped
    assert "the chat template cuts or rewrites the answer" in reason
    assert "generate.reasoning=drop" in reason
    assert "model.chat_template" in reason


def test_pairs_that_differ_in_what_the_template_cuts_are_not_called_equal() -> None:
    given = pair(chosen="<think>good</think>abc", rejected="<think>bad</think>abc")
    (reason,) = tokenise_pairs([given], phi("m['content'].split('</think>')[-1]"), max_length=128).dropped
    assert "cuts or rewrites" in reason


def test_white_space_around_an_answer_may_go_and_what_a_template_adds_may_come() -> None:
    given = pair(chosen="\nabc \n")
    assert only_row(given, phi("m['content'] | trim")).chosen_ids == only_row(pair(), phi()).chosen_ids
    thinks = phi("('<think>\n\n</think>\n\n' if m['role'] == 'assistant' else '') + m['content']")
    assert thinks.tokenizer.decode(only_row(pair(), thinks).chosen_ids) == "<think>\n\n</think>\n\nabc<|end|>"


def test_earlier_turns_are_what_the_template_makes_of_them() -> None:
    format_ = phi("m['content'] if loop.last else m['content'].split('</think>')[-1]")
    before = [("user", "sort ba"), ("assistant", "<think>hm</think>ab")]
    row = only_row(pair(chosen="<think>hm</think>abc", before=before), format_)
    assert "hm" not in format_.tokenizer.decode(row.prompt_ids)
    assert format_.tokenizer.decode(row.chosen_ids) == "<think>hm</think>abc<|end|>"


@pytest.mark.parametrize("template", [INST.replace("[/INST]'", "[/INST] '").replace("' ' + m", "m"), None])
@pytest.mark.parametrize("answer", ["abc", "cba 1", "1 2 3", "e"])
def test_no_space_comes_between_prompt_and_answer_that_the_text_does_not_have(
    template: str | None, answer: str
) -> None:
    """A tokenizer as Llama's puts a space of its own in front of whatever it encodes."""
    if template is None:
        format_, conversational = ChatFormat(load("llama-2").tokenizer, use_template=False), False
    else:
        format_, conversational = load("llama-2", template=template), True
    given = pair("sort ca", answer, "b", conversational=conversational)
    row = only_row(given, format_)
    text = "<s> [INST] sort ca [/INST] " if conversational else "<s> sort ca"
    text += answer + (" " if conversational else "")
    shown = format_.tokenizer.decode([*row.prompt_ids, *row.chosen_ids])
    assert shown.replace("<s>", "<s> ").replace("  ", " ") == f"{text}</s>".replace("<s>  ", "<s> ")


@pytest.mark.parametrize("stops", [(), ("<|endoftext|>",), ("<|user|>",)])
def test_the_token_that_ends_the_templates_turn_is_one_at_which_generation_stops(stops: tuple[str, ...]) -> None:
    """However the checkpoint calls its EOS: many an SFT run leaves <|endoftext|> there."""
    tokenizer = load("phi-3").tokenizer
    format_ = ChatFormat(tokenizer, tokenizer.convert_tokens_to_ids(list(stops)))
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert end in format_.stop_ids
    assert only_row(pair(), format_).chosen_ids.count(end) == 1
    assert only_row(pair(), format_).chosen_ids[-1] == end
    (found,) = [f for f in format_.findings([]) if f.name == "end of turn"]
    assert found.result == "warned"
    assert "ends a turn with <|end|>" in found.detail
    assert "<|endoftext|>" in found.detail


def test_an_end_of_turn_at_which_the_checkpoint_stops_by_itself_is_proved() -> None:
    for name in ("chatml", "llama-2", "gemma", "llama-3"):
        assert [f.result for f in load(name).findings([]) if f.name == "end of turn"] == ["proved"], name


@pytest.mark.parametrize(
    ("end", "said"),
    [
        ("", "does not end the assistant's turn"),
        ("\n\n", "does not end the assistant's turn"),
        ("{{ '<|end|>' if not loop.last }}", "does not end the assistant's turn"),
        ("</turn>", r"'</turn>', which is no token of this tokenizer but \d in a row"),
        ("\n### Stop<|end|>", "which is no token of this tokenizer"),
    ],
)
def test_a_template_without_one_token_that_ends_a_turn_is_refused(end: str, said: str) -> None:
    with pytest.raises(UsageError, match=rf"{said}.*\(model\.chat_template\)"):
        only_row(pair(), phi(end=end))


def test_text_in_the_templates_form_ends_as_the_template_does() -> None:
    """data.template=never, for prompts that were rendered before; the checkpoint's EOS is another token."""
    format_ = ChatFormat(load("phi-3").tokenizer, use_template=False)
    given = pair("<|user|>\nsort cab<|end|>\n<|assistant|>\n", conversational=False)
    assert format_.tokenizer.decode(only_row(given, format_).chosen_ids) == "abc<|end|>"
    assert format_.tokenizer.decode(only_row(pair(conversational=False), format_).chosen_ids) == "abc<|endoftext|>"


TOOLS = (
    "{% if tools %}<|user|>{% for t in tools %}{{ t | tojson }}{% endfor %}<|end|>{% endif %}"
    "{% if loud is defined and loud %}<|user|>LOUD<|end|>{% endif %}"
    "{% for m in messages %}<|{{ 'user' if m['role'] != 'assistant' else 'assistant' }}|>\n{{ m['content'] }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}({{ c.function.arguments | tojson }}){% endfor %}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "sort", "parameters": {"letters": {"type": "string"}}}}


def calling(name: str) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": name, "arguments": {"letters": "cab"}}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def test_tools_and_template_arguments_of_a_row_reach_prompts_and_answers() -> None:
    format_ = load("phi-3", template=TOOLS)
    given = replace(pair(), given=Given([TOOL], {"loud": True}))
    row = only_row(given, format_)
    theirs = format_.tokenizer.apply_chat_template(
        list(given.prompt), tools=[TOOL], loud=True, tokenize=True, return_dict=False, add_generation_prompt=True
    )
    assert list(row.prompt_ids) == theirs == format_.prompt_ids(given.prompt, conversational=True, given=given.given)
    assert '"sort"' in format_.tokenizer.decode(theirs)
    assert given.prompt_id != pair().prompt_id


def test_an_answer_that_calls_a_tool_is_trained_on_where_the_template_writes_calls() -> None:
    given = replace(pair(), chosen=(calling("sort"),), rejected=(calling("reverse"),))
    format_ = load("phi-3", template=TOOLS)
    assert "<call>sort(" in format_.tokenizer.decode(only_row(given, format_).chosen_ids)
    (reason,) = tokenise_pairs([given], phi(), max_length=128).dropped
    assert "leaves out the answer's `tool_calls`" in reason


def test_what_rows_give_a_template_needs_one() -> None:
    given = replace(pair(conversational=False), given=Given([TOOL]))
    with pytest.raises(UsageError, match=r"give the chat template tools, and prompts do not go through one"):
        only_row(given, ChatFormat(load("phi-3").tokenizer, use_template=False))
