"""Precondition 1: a checkpoint whose files do not give every parameter is refused by name, before anything is trained."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.study.errors import UsageError
from harness.train.base import load_model
from harness.train.weights import check_weights
from tests.train.sft_folders import edit, rewrite, save_base

Tensors = dict[str, Any]


@pytest.fixture(scope="module")
def olmo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An OLMo 2 of two layers whose head is not tied."""
    from transformers import Olmo2Config, Olmo2ForCausalLM

    return save_base(tmp_path_factory.mktemp("olmo") / "olmo", Olmo2Config, Olmo2ForCausalLM, pad_token_id=0)


@pytest.fixture
def folder(olmo: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    shutil.copytree(olmo, tmp_path / "sft")
    return tmp_path / "sft"


def check(folder: Path, about: str = "") -> list[str]:
    """Check a folder as a sweep does, with a cache of its own."""
    return check_weights(folder, named=f"model.path={folder}", about=[about], cache=folder.parent / "cache")


def renamed(prefix: str) -> Callable[[Tensors], Tensors]:
    """Put a prefix before every name."""
    return lambda found: {prefix + name: tensor for name, tensor in found.items()}


def without(*parts: str) -> Callable[[Tensors], Tensors]:
    """Take the tensors away whose name has one of these parts."""
    return lambda found: {name: tensor for name, tensor in found.items() if not any(part in name for part in parts)}


def added(name: str, like: str = "model.norm.weight") -> Callable[[Tensors], Tensors]:
    """Add a tensor that is a copy of another one."""
    return lambda found: found | {name: found[like].clone()}


def grown(found: Tensors) -> Tensors:
    """Give the embeddings two rows more than config.json says."""
    import torch

    rows = ("model.embed_tokens.weight", "lm_head.weight")
    return found | {name: torch.cat([found[name], found[name][:2]]) for name in rows}


def spoiled(number: float) -> Callable[[Tensors], Tensors]:
    """Put one number that is none into a weight."""

    def change(found: Tensors) -> Tensors:
        found["model.layers.1.mlp.up_proj.weight"][3, 4] = number
        return found

    return change


REFUSED: dict[str, tuple[Callable[[Tensors], Tensors], list[str]]] = {
    "names of a compiled model": (renamed("_orig_mod."), ["would be random", "with `_orig_mod.` in front"]),
    "names of a distributed model": (renamed("module."), ["with `module.` in front"]),
    "names of PEFT": (renamed("base_model.model."), ["with `base_model.model.` in front"]),
    "names of a value-head model": (renamed("pretrained_model."), ["with `pretrained_model.` in front"]),
    "names of an FSDP wrapper": (renamed("_fsdp_wrapped_module."), ["_fsdp_wrapped_module.lm_head.weight"]),
    "one weight missing": (
        without("layers.1.mlp.up"),
        ["1 parameter (model.layers.1.mlp.up_proj.weight) of the model is"],
    ),
    "a norm missing": (without("model.norm"), ["model.norm.weight"]),
    "a layer missing": (without("layers.1."), ["parameters (model.layers.1."]),
    "no head, and not tied": (without("lm_head"), ["lm_head.weight", "say tie_word_embeddings: true in config.json"]),
    "a vocabulary that has grown": (grown, ["lm_head.weight is 136x32, not 134x32", "vocab_size"]),
    "empty tensors of a sharded save": (
        lambda found: {name: x[:0] if x.dim() == 2 else x for name, x in found.items()},
        ["is 0x32, not 134x32"],
    ),
    "an adapter's tensors among the weights": (
        added("model.layers.0.self_attn.q_proj.lora_A.weight"),
        ["of an adapter that would be left out", "merge_and_unload"],
    ),
    "a layer more than the config has": (
        added("model.layers.2.mlp.up_proj.weight"),
        ["of layers that config.json does not"],
    ),
    "a bias that the config does not have": (
        added("model.layers.0.self_attn.q_proj.bias"),
        ["of layers that have no bias by config.json"],
    ),
    "NaN": (spoiled(float("nan")), ["1 of 1536 numbers of model.layers.1.mlp.up_proj.weight are NaN or infinite"]),
    "infinity": (spoiled(float("-inf")), ["are NaN or infinite"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_parameter_that_does_not_come_from_the_file_is_named(case: str, folder: Path) -> None:
    change, messages = REFUSED[case]
    rewrite(folder, change)
    with pytest.raises(UsageError) as refused:
        check(folder)
    said = str(refused.value)
    assert said.startswith(f"model.path={folder}: ")
    for message in messages:
        assert message in said
    assert "\n" not in said


@pytest.mark.parametrize("case", ["names of a compiled model", "a vocabulary that has grown", "one weight missing"])
def test_each_load_checks_as_well(case: str, folder: Path) -> None:
    import torch

    rewrite(folder, REFUSED[case][0])
    with pytest.raises(UsageError, match=REFUSED[case][1][-1].partition("(")[0]):
        load_model(folder, torch.float32)


def test_a_whole_checkpoint_is_checked_once_per_content(folder: Path) -> None:
    assert check(folder) == []
    rewrite(folder, without("lm_head"))
    assert check(folder) == [], "the hashes that were given are those of a folder that was found whole"
    with pytest.raises(UsageError):
        check(folder, about="other hashes")


def test_tensors_without_a_place_are_listed_in_a_warning(folder: Path) -> None:
    rewrite(folder, lambda found: added("v_head.weight")(added("model.vision.proj.weight")(found)))
    assert check(folder) == check(folder)  # from the cache as well
    assert check(folder) == [
        f"model.path={folder}: its files hold 2 tensors that are no part of the language model and left out: "
        "model.vision.proj.weight, v_head.weight"
    ]


class TestTies:
    """A head that is the embeddings need not be in the file; one that is not must be."""

    @pytest.fixture
    def tied(self, tmp_path: Path) -> Path:
        from transformers import GraniteConfig, GraniteForCausalLM

        return save_base(tmp_path / "sft", GraniteConfig, GraniteForCausalLM, tie_word_embeddings=True)

    def test_a_tied_head_is_not_missing(self, tied: Path) -> None:
        rewrite(tied, without("lm_head"))
        assert check(tied) == []

    def test_embeddings_may_stand_under_the_heads_name(self, tied: Path) -> None:
        rewrite(tied, lambda found: {name.replace("model.embed_tokens", "lm_head"): x for name, x in found.items()})
        assert check(tied) == []

    def test_two_different_tensors_are_no_tie(self, tied: Path) -> None:
        rewrite(tied, lambda found: found | {"lm_head.weight": found["model.embed_tokens.weight"] * 2})
        with pytest.raises(UsageError, match=r"config.json ties lm_head.weight to model.embed_tokens.weight, and the"):
            check(tied)
        assert check(edit(tied, tie_word_embeddings=False)) == []

    def test_the_same_tensor_twice_is_one(self, tied: Path) -> None:
        rewrite(tied, lambda found: found | {"lm_head.weight": found["model.embed_tokens.weight"].clone()})
        assert check(tied) == []

    def test_neither_of_both_is_missing(self, tied: Path) -> None:
        rewrite(tied, without("lm_head", "embed_tokens"))
        with pytest.raises(UsageError, match="embed_tokens"):
            check(tied)


def test_names_without_the_inner_prefix_are_read_where_transformers_reads_them(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = save_base(tmp_path / "sft", GPT2Config, GPT2LMHeadModel, n_embd=32, n_layer=2, n_head=4)
    rewrite(folder, lambda found: {name.removeprefix("transformer."): x for name, x in found.items()})
    assert check(folder) == []


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "a type that transformers does not have": ({"model_type": "zebra"}, "of this type"),
    "code of its own": (
        {"model_type": "zebra", "auto_map": {"AutoConfig": "z.Zebra", "AutoModelForCausalLM": "z.ZebraLM"}},
        "Python code of its own (auto_map in config.json), which is never run",
    ),
    "a config that fits no model": ({"hidden_act": "zebra"}, "it cannot be loaded"),
    "an encoder and a decoder": ({"model_type": "t5", "is_encoder_decoder": True}, "encoder-decoder"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_transformers_cannot_load_as_a_language_model_is_refused(case: str, folder: Path) -> None:
    values, message = OTHERS[case]
    with pytest.raises(UsageError) as refused:
        check(edit(folder, **values))
    assert message in str(refused.value)


def test_a_tokenizer_that_cannot_be_read_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UsageError, match="the tokenizer cannot be read"):
        check(folder)
