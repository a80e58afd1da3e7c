"""Checkpoints made of others: every adapter that people save is merged once and computes the same, or is refused."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from harness.config.checkpoint import Checkpoints, Derivation
from harness.config.schema import ModelConfig
from harness.study.errors import UsageError
from harness.train.base import load_model
from harness.train.derived import derive
from tests.train.sft_folders import edit, logits_of, rewrite, save_adapter, save_base, save_tokenizer, vocabulary

CONFIG = "adapter_config.json"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 of two layers, tied embeddings, biases in its attention."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("bases") / "qwen2"
    return save_base(folder, Qwen2Config, Qwen2ForCausalLM, tie_word_embeddings=True)


def resolved(folder: Path, results: Path) -> Path:
    """Return the folder that a study with this model loads."""
    return Checkpoints(derive).folder(ModelConfig(str(folder)), str(results))


def loaded(folder: Path) -> Any:
    """Load a folder as a study does."""
    import torch

    return load_model(folder, torch.float32)


def with_adapter(base: Path, adapter: Path, *, rows: int = 0) -> Any:
    """Return the logits of a base with its adapter beside it, as PEFT computes them."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    return logits_of(PeftModel.from_pretrained(model, adapter))


def adapters() -> dict[str, dict[str, Any]]:
    """Return kinds of adapters by name, as arguments of `save_adapter`."""
    from peft import IA3Config, LoHaConfig, OFTConfig

    task = {"task_type": "CAUSAL_LM"}
    layers = ["q_proj", "v_proj"]
    return {
        "LoRA": {},
        "rsLoRA": {"use_rslora": True, "r": 8},
        "DoRA": {"use_dora": True},
        "ranks by layer": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 32}},
        "biases": {"bias": "lora_only"},
        "a head of its own on tied embeddings": {"modules_to_save": ["lm_head"], "target_modules": layers},
        "embeddings of its own": {"modules_to_save": ["embed_tokens"], "target_modules": layers},
        "both of its own": {"modules_to_save": ["embed_tokens", "lm_head"], "target_modules": layers},
        "LoRA on embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
        "some tokens": {"trainable_token_indices": [5, 6], "target_modules": layers},
        "norms": {"modules_to_save": ["norm"], "target_modules": layers},
        "IA3": {"config": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], **task)},
        "LoHa": {"config": LoHaConfig(target_modules=layers, **task)},
        "OFT": {"config": OFTConfig(target_modules=layers, oft_block_size=4, **task)},
    }


@pytest.mark.parametrize("kind", list(adapters()))
def test_base_and_adapter_are_one_model(kind: str, base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(base, tmp_path / "sft", **adapters()[kind])
    folder = resolved(adapter, tmp_path / "results")
    found, wanted = logits_of(loaded(folder)), with_adapter(base, adapter)
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert (found - logits_of(loaded(base))).abs().max() > 1e-3 * wanted.abs().max()
    assert not list(folder.glob("adapter*"))


@pytest.mark.parametrize("architecture", ["GPT2", "Mixtral", "Gemma2"])
def test_adapters_on_other_architectures_are_merged(architecture: str, tmp_path: Path) -> None:
    import transformers

    config, model = (
        getattr(transformers, f"{architecture}{end}")
        for end in ("Config", "ForCausalLM" if architecture != "GPT2" else "LMHeadModel")
    )
    more = (
        {"head_dim": 8}
        if architecture == "Gemma2"
        else {"n_embd": 32, "n_layer": 2, "n_head": 4}
        if architecture == "GPT2"
        else {}
    )
    base = save_base(tmp_path / "base", config, model, **more)
    adapter = save_adapter(base, tmp_path / "sft")
    found, wanted = logits_of(loaded(resolved(adapter, tmp_path / "results"))), with_adapter(base, adapter)
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_tokens_that_sft_added_come_with_the_adapter(base: Path, tmp_path: Path) -> None:
    rows = vocabulary() + 3
    adapter = save_adapter(
        base, tmp_path / "sft", prepare=lambda model: model.resize_token_embeddings(rows, mean_resizing=False)
    )
    save_tokenizer(adapter, chat=False)
    folder = resolved(adapter, tmp_path / "results")
    model = loaded(folder)
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == rows
    assert (logits_of(model) - with_adapter(base, adapter, rows=rows)).abs().max() < 1e-4
    assert not (folder / "chat_template.jinja").exists(), "the adapter's tokenizer is the one that SFT used"


def test_a_base_in_bf16_stays_in_bf16(base: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    half = tmp_path / "half"
    shutil.copytree(base, half)
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(half)
    adapter = save_adapter(half, tmp_path / "sft")
    folder = resolved(adapter, tmp_path / "results")
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    wanted = with_adapter(half, adapter)
    assert (logits_of(loaded(folder)) - wanted).pow(2).mean().sqrt() < 0.1 * wanted.std()


def test_the_tokenizer_comes_from_where_it_is(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(base, tmp_path / "sft")
    (adapter / "chat_template.jinja").write_text("{{ messages }}")  # and no tokenizer
    folder = resolved(adapter, tmp_path / "results")
    assert (folder / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert (folder / "chat_template.jinja").read_text() == "{{ messages }}"


def test_an_adapter_is_merged_once_for_all_that_load_it(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(base, tmp_path / "sft")
    made: list[Path] = []

    def counted(derivation: Derivation, target: Path) -> None:
        made.append(target)
        derive(derivation, target)

    found: list[Path] = []

    def load() -> None:
        found.append(Checkpoints(counted).folder(ModelConfig(str(adapter)), str(tmp_path / "results")))

    threads = [threading.Thread(target=load) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == len(made) == 1
    assert [path.name for path in found[0].parent.iterdir() if path.name != ".lock"] == [found[0].name]


def test_a_merge_that_ends_halfway_leaves_nothing_and_a_damaged_one_is_made_again(base: Path, tmp_path: Path) -> None:
    adapter, results = save_adapter(base, tmp_path / "sft"), tmp_path / "results"

    def killed(derivation: Derivation, target: Path) -> None:
        derive(derivation, target)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Checkpoints(killed).folder(ModelConfig(str(adapter)), str(results))
    assert [path.name for path in (results / ".cache" / "merged").iterdir()] == [".lock"]
    folder = resolved(adapter, results)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-4] + b"\0\0\0\1")
    assert (resolved(adapter, results) / "model.safetensors").read_bytes() == whole


def test_the_identity_is_that_of_the_contents(base: Path, tmp_path: Path) -> None:
    """Neither the place nor the name changes it; another adapter, or another base, does."""

    def hashes(adapter: Path, results: str = "results") -> tuple[str, str]:
        checkpoints = Checkpoints(derive)
        folder = checkpoints.folder(ModelConfig(str(adapter)), str(tmp_path / results))
        return checkpoints.base_sha256(folder), checkpoints.tokenizer_sha256(folder)

    first = save_adapter(base, tmp_path / "first")
    moved = tmp_path / "elsewhere" / "moved"
    shutil.copytree(first, moved)
    shutil.copytree(base, tmp_path / "elsewhere" / "base")
    edit(moved, CONFIG, base_model_name_or_path="../base")
    assert hashes(first) == hashes(moved, "others")
    scaled = tmp_path / "scaled"
    shutil.copytree(first, scaled)
    edit(scaled, CONFIG, lora_alpha=8)
    assert hashes(scaled)[0] != hashes(first)[0]


def test_an_adapter_on_an_adapter_is_merged_into_the_merged_one(base: Path, tmp_path: Path) -> None:
    first = save_adapter(base, tmp_path / "first")
    merged = resolved(first, tmp_path / "results")
    second = edit(save_adapter(merged, tmp_path / "second", r=2), CONFIG, base_model_name_or_path=str(first))
    found, wanted = logits_of(loaded(resolved(second, tmp_path / "results"))), with_adapter(merged, second)
    assert (found - wanted).abs().max() < 1e-4


class TestWeightsAndAdapterInOneFolder:
    """What loaders disagree about: some take both, some the weights alone."""

    def both(self, base: Path, folder: Path, named: str) -> Path:
        shutil.copytree(base, folder)
        return edit(save_adapter(base, folder), CONFIG, base_model_name_or_path=named)

    @pytest.mark.parametrize("named", ["itself", "a copy of it", "a relative path"])
    def test_merged_where_the_adapter_belongs_to_the_weights(self, named: str, base: Path, tmp_path: Path) -> None:
        shutil.copytree(base, tmp_path / "copy")
        name = {"itself": ".", "a copy of it": str(tmp_path / "copy"), "a relative path": "../copy"}[named]
        adapter = save_adapter(base, tmp_path / "alone")
        folder = resolved(self.both(base, tmp_path / "both", name), tmp_path / "results")
        assert (logits_of(loaded(folder)) - with_adapter(base, adapter)).abs().max() < 1e-5

    @pytest.mark.parametrize("named", ["other weights", "a base that is not here", "nothing"])
    def test_refused_where_it_belongs_to_others(self, named: str, base: Path, tmp_path: Path) -> None:
        shutil.copytree(base, tmp_path / "other")
        rewrite(tmp_path / "other", lambda tensors: {name: tensor * 1.01 for name, tensor in tensors.items()})
        name = {"other weights": str(tmp_path / "other"), "a base that is not here": "Qwen/none", "nothing": ""}[named]
        folder = self.both(base, tmp_path / "both", name)
        with pytest.raises(UsageError, match=r"both: the folder holds weights and an adapter, and the adapter belongs"):
            resolved(folder, tmp_path / "results")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no base named": ({"base_model_name_or_path": None}, "names no base"),
    "a base that is gone": ({"base_model_name_or_path": "/root/sft/out"}, "no such folder; write the base's folder"),
    "its own folder": ({"base_model_name_or_path": "."}, "names its own folder as the base"),
    "prompt tuning": ({"peft_type": "PROMPT_TUNING"}, "peft_type=PROMPT_TUNING) cannot be merged"),
    "a classifier's": ({"task_type": "SEQ_CLS"}, "task_type=SEQ_CLS) is not of a language model"),
    "an activated LoRA": ({"alora_invocation_tokens": [1, 2]}, "acts on a part of a text"),
    "a kind that PEFT does not know": ({"peft_type": "MAGIC"}, "its adapter cannot be merged into"),
    "a setting that PEFT does not know": (
        {"use_zebra_scaling": True},
        "does not know (adapter_config.json: use_zebra_",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_adapter_that_cannot_be_merged_is_refused(case: str, base: Path, tmp_path: Path) -> None:
    from harness.config.checkpoint import folder_problems

    values, message = REFUSED[case]
    adapter = edit(save_adapter(base, tmp_path / "sft", target_modules=["q_proj"]), CONFIG, **values)
    said = list(folder_problems(adapter))
    if not said:
        with pytest.raises(UsageError) as refused:
            resolved(adapter, tmp_path / "results")
        said = [str(refused.value)]
    assert message in said[0]
    assert not list((tmp_path / "results").rglob("*.safetensors"))


def test_an_adapter_of_another_base_is_refused_by_its_tensors(base: Path, tmp_path: Path) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    for name, more in (("deeper", {"num_hidden_layers": 3}), ("wider", {"hidden_size": 64})):
        other = save_base(tmp_path / name, Qwen2Config, Qwen2ForCausalLM, tie_word_embeddings=True, **more)
        adapter = save_adapter(other, tmp_path / f"sft-{name}")
        edit(adapter, CONFIG, base_model_name_or_path=str(base))
        with pytest.raises(UsageError, match="does not fit the base"):
            resolved(adapter, tmp_path / "results")


def test_an_adapter_with_numbers_that_are_none_is_refused(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(base, tmp_path / "sft")
    rewrite(adapter, lambda found: {name: x * float("nan") for name, x in found.items()}, "adapter_model.safetensors")
    with pytest.raises(UsageError, match="no finite logits"):
        resolved(adapter, tmp_path / "results")


def test_a_base_in_4_bits_is_refused_with_what_to_name_instead(base: Path, tmp_path: Path) -> None:
    bits = tmp_path / "qwen2-bnb-4bit"
    shutil.copytree(base, bits)
    edit(bits, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    adapter = edit(save_adapter(base, tmp_path / "sft"), CONFIG, base_model_name_or_path=str(bits))
    with pytest.raises(UsageError, match=r"adapter's base .*bnb-4bit: its weights are quantised .*write its folder"):
        resolved(adapter, tmp_path / "results")


def multimodal(kind: str) -> Any:
    """Return a model that sees images, untrained, with a language model of two layers."""
    import torch
    import transformers

    text: dict[str, Any] = {
        **{"vocab_size": vocabulary(), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128},
    }
    sight: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "patch_size": 14}
    one = {"num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 28}
    if kind == "Gemma3":
        parts = {"text_config": text | {"sliding_window": 16}, "vision_config": sight | one, "mm_tokens_per_image": 4}
    elif kind == "Mistral3":
        parts = {
            **{"text_config": text | {"model_type": "mistral"}, "image_token_index": 10},
            **{"vision_config": sight | one | {"model_type": "pixtral"}},
        }
    else:
        rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
        parts = {
            "text_config": text | {"rope_parameters": rope, "bos_token_id": 1, "eos_token_id": 2},
            "vision_config": sight | {"depth": 1, "num_heads": 4, "out_hidden_size": 32},
        }
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**parts)
    return getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()


@pytest.mark.parametrize("kind", ["Gemma3", "Mistral3", "Qwen2_5_VL"])
def test_of_a_multimodal_model_the_language_model_is_trained(kind: str, tmp_path: Path) -> None:
    whole = multimodal(kind)
    whole.save_pretrained(tmp_path / "whole")
    save_tokenizer(tmp_path / "whole")
    folder = resolved(tmp_path / "whole", tmp_path / "results")
    text = loaded(folder)
    assert type(text).__name__.endswith("ForCausalLM")
    assert not any("vision" in name or "visual" in name for name, _ in text.named_parameters())
    assert (logits_of(text) - logits_of(whole)).abs().max() < 1e-5
    adapter = edit(save_adapter(folder, tmp_path / "sft"), CONFIG, base_model_name_or_path=str(tmp_path / "whole"))
    found = logits_of(loaded(resolved(adapter, tmp_path / "results")))
    assert (found - with_adapter(folder, adapter)).abs().max() < 1e-5


def test_an_adapter_on_a_whole_multimodal_model_is_merged_before_its_text_part_is_taken(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    whole = multimodal("Gemma3")
    whole.save_pretrained(tmp_path / "whole")
    save_tokenizer(tmp_path / "whole")
    whole.name_or_path = str(tmp_path / "whole")
    layers = ["q_proj", "v_proj"]
    adapted = get_peft_model(whole, LoraConfig(target_modules=layers, task_type="CAUSAL_LM", init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "sft")
    found = logits_of(loaded(resolved(tmp_path / "sft", tmp_path / "results")))
    assert (found - logits_of(adapted)).abs().max() < 1e-5


def test_a_multimodal_model_without_a_language_model_is_refused(tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    CLIPModel(
        CLIPConfig(text_config=small, vision_config=small | {"image_size": 28, "patch_size": 14})
    ).save_pretrained(tmp_path / "clip")
    save_tokenizer(tmp_path / "clip")
    with pytest.raises(
        UsageError, match="clip is a multimodal model whose language model transformers has no class for"
    ):
        resolved(tmp_path / "clip", tmp_path / "results")


def test_a_base_on_the_hub_is_the_downloaded_one(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = tmp_path / "hub" / "models--zebra--base"
    shutil.copytree(base, hub / "snapshots" / "0123456789abcdef0123456789abcdef01234567")
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("0123456789abcdef0123456789abcdef01234567")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    adapter = edit(save_adapter(base, tmp_path / "sft"), CONFIG, base_model_name_or_path="zebra/base")
    found = logits_of(loaded(resolved(adapter, tmp_path / "results")))
    assert (found - with_adapter(base, adapter)).abs().max() < 1e-5
    edit(adapter, CONFIG, base_model_name_or_path="zebra/other")
    with pytest.raises(UsageError, match=r"the base of its adapter, zebra/other: not to be had from the Hub"):
        resolved(adapter, tmp_path / "results")


def test_what_a_trainer_leaves_beside_an_adapter_is_no_second_model(base: Path, tmp_path: Path) -> None:
    """LLaMA-Factory leaves a value head and states, unsloth a config, axolotl a folder with the merged model."""
    adapter = save_adapter(base, tmp_path / "sft")
    for name in ("README.md", "trainer_state.json", "training_args.bin", "value_head.safetensors"):
        (adapter / name).write_text("{}")
    shutil.copyfile(base / "config.json", adapter / "config.json")
    shutil.copytree(base, adapter / "merged")
    shutil.copytree(adapter, adapter / "checkpoint-40", ignore=shutil.ignore_patterns("checkpoint-*", "merged"))
    for folder in (adapter, adapter / "checkpoint-40"):
        edit(folder, CONFIG, base_model_name_or_path=str(base))
        found = logits_of(loaded(resolved(folder, tmp_path / "results")))
        assert (found - with_adapter(base, adapter)).abs().max() < 1e-5
