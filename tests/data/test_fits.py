"""What a checkpoint has room for: a row of the embedding for each token, a position for each token of a sequence."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken

from harness.config.paths import embedded_dir
from harness.data.fits import Lengths, Tables, check_ids, check_lengths, read_tables
from harness.data.inputs import Inputs
from harness.data.tokens import ChatFormat
from harness.study.errors import UsageError
from harness.study.files import read_json, write_json, write_jsonl
from harness.sweep.app import run_sweep
from harness.sweep.problems import load_run
from tests.conftest import tiny_model

SIZES = {"num_hidden_layers": 1, "max_position_embeddings": 24}
GPT = {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 24, "vocab_size": 97}


def saved(tmp_path: Path, name: str, **sizes: Any) -> tuple[Any, Tables]:
    import transformers

    model = tiny_model(
        getattr(transformers, f"{name}Config"),
        getattr(transformers, f"{name}ForCausalLM", None) or getattr(transformers, f"{name}LMHeadModel"),
        **sizes,
    )
    model.save_pretrained(tmp_path)
    return model, read_tables(tmp_path)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("GPTBigCode", GPT),
        ("GPTJ", {**GPT, "rotary_dim": 4}),
        ("CTRL", {**GPT, "dff": 48}),
        ("OPT", {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32}),
        ("BioGpt", SIZES),
        ("Roberta", {**SIZES, "is_decoder": True}),
        ("Mpt", {"d_model": 32, "n_layers": 1, "n_heads": 4, "max_seq_len": 24, "vocab_size": 97}),
        ("Llama", SIZES),
        ("Bloom", {"n_layer": 1, "n_head": 4}),
        ("Mamba", {"num_hidden_layers": 1, "state_size": 4}),
    ],
)
def test_the_longest_possible_sequence_is_the_one_that_the_model_computes(
    tmp_path: Path, name: str, sizes: dict[str, Any]
) -> None:
    import torch

    model, tables = saved(tmp_path, name, **sizes)
    assert tables.rows == 97
    limit = tables.positions if tables.absolute else 40
    assert limit is not None
    model(input_ids=torch.full((1, limit), 5), attention_mask=torch.ones(1, limit))
    if tables.absolute:
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, limit + 1), 5), attention_mask=torch.ones(1, limit + 1))


def test_lengths_beyond_absolute_positions_are_refused_with_both_numbers() -> None:
    lengths = Lengths(pair=80, prompt=30, follow_up=0)
    with pytest.raises(UsageError) as error:
        list(check_lengths(Tables(97, 64, True), lengths, max_length=1024, new_tokens=40))
    first, second = str(error.value).splitlines()
    assert first.startswith("generate.max_new_tokens=40: the longest prompt has 30 tokens, together 70, and the model")
    assert "has 64 positions; give at most 34" in first
    assert second.startswith("data.max_length=1024: the longest pair has 80 tokens, and the model has 64 positions")


def test_lengths_beyond_rotary_positions_are_warned_of() -> None:
    lengths = Lengths(pair=80, prompt=30, follow_up=0)
    found = list(check_lengths(Tables(97, 64, False), lengths, max_length=1024, new_tokens=40))
    assert [finding.result for finding in found] == ["warned", "warned"]


def test_what_fits_to_the_last_position_is_proved() -> None:
    lengths = Lengths(pair=64, prompt=24, follow_up=0)
    (found,) = check_lengths(Tables(97, 64, True), lengths, max_length=64, new_tokens=40)
    assert found.result == "proved"
    assert list(check_lengths(Tables(97, None, False), lengths, max_length=64, new_tokens=4000)) == []


def test_a_second_turn_has_two_answers_in_its_sequence() -> None:
    lengths = Lengths(pair=10, prompt=10, follow_up=20)
    with pytest.raises(UsageError, match=r"max_new_tokens=25.*together 70"):
        list(check_lengths(Tables(97, 64, True), lengths, max_length=64, new_tokens=25))


@pytest.fixture(scope="module")
def widened(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded base, with two tokens more in its tokenizer than rows in its embedding."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("widened") / "base"
    shutil.copytree(embedded_dir(), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken("zz"), AddedToken("qq")])
    tokenizer.save_pretrained(folder)
    return folder


def chat_of(folder: Path) -> ChatFormat:
    from harness.data.tokens import load_chat_format

    return load_chat_format(folder, revision=None, template=None, auto=True)


def test_a_token_without_a_row_that_the_data_use_is_refused_by_name(widened: Path) -> None:
    chat, tables = chat_of(widened), read_tables(widened)
    assert tables.rows is not None
    with pytest.raises(UsageError) as error:
        list(
            check_ids(
                tables,
                chat,
                [chat.prompt_ids([{"role": "user", "content": "a qq b"}], conversational=True)],
                encodes_answers=False,
            )
        )
    assert f"the tokenizer has {tables.rows + 2} tokens and the embedding {tables.rows} rows" in str(error.value)
    assert f"the data use qq (id {tables.rows + 1})" in str(error.value)
    assert "resize_token_embeddings" in str(error.value)


def test_tokens_without_a_row_that_nothing_uses_are_warned_of_unless_answers_may_become_prompts(widened: Path) -> None:
    chat, tables = chat_of(widened), read_tables(widened)
    (found,) = check_ids(tables, chat, [[1, 2]], encodes_answers=False)
    assert (found.result, "zz (id" in found.detail) == ("warned", True)
    with pytest.raises(UsageError, match="zz"):
        list(check_ids(tables, chat, [[1, 2]], encodes_answers=True))


def test_an_embedding_with_rows_to_spare_is_fine() -> None:
    chat = chat_of(embedded_dir())
    (found,) = check_ids(Tables(512, None, False), chat, [[1, 2]], encodes_answers=True)
    assert found.result == "proved"


def test_padding_that_has_no_row_is_not_used(tmp_path: Path) -> None:
    """Many a Llama got a [PAD] token and no row for it."""
    from transformers import AutoTokenizer

    folder = tmp_path / "base"
    shutil.copytree(embedded_dir(), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    chat = Inputs().tokens(load_run(["+method=dpo", *own_data(), f"model.path={folder}"])).chat
    assert chat.tokenizer.pad_token_id == chat.tokenizer.eos_token_id


def own_data() -> list[str]:
    return [f"data.{split}={embedded_dir() / split}.jsonl" for split in ("train", "dev", "golden")]


def test_a_plan_refuses_what_the_model_has_no_room_for(widened: Path, small: list[str], tmp_path: Path) -> None:
    golden = write_jsonl_of(tmp_path / "golden.jsonl", [{"prompt": "say qq", "checks": [{"contains": "q"}]}])
    data = [*own_data()[:2], f"data.golden={golden}"]
    with pytest.raises(UsageError, match="tokens without a row in the embedding"):
        run_sweep(["+method=simpo,dpo", "plan=true", *small, *data, f"model.path={widened}"])
    folder = tmp_path / "short"
    shutil.copytree(embedded_dir(), folder)
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", config | {"model_type": "mpt", "max_seq_len": 20})
    with pytest.raises(UsageError, match=r"generate\.max_new_tokens=12.*20 positions"):
        Inputs().tokens(load_run(["+method=dpo", *small, *own_data(), f"model.path={folder}"]))


def write_jsonl_of(path: Path, rows: list[dict[str, Any]]) -> Path:
    write_jsonl(path, rows)
    return path
