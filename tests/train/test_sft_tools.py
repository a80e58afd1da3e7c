"""Folders as TRL, LLaMA-Factory, axolotl, unsloth and torchtune save them: read right, or refused by name.

Each docstring names the file of the tool's source that says what the tool writes.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness.config.checkpoint import folder_problems
from harness.config.checkpoint_files import in_full_precision
from harness.study.errors import UsageError
from harness.train.weights import check_weights
from tests.train.sft_folders import edit, logits_of, move, rewrite, save_base, save_tokenizer, vocabulary
from tests.train.test_derived import loaded, resolved

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
ATTENTION = ["q_proj", "v_proj"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers with a head of its own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return save_base(tmp_path_factory.mktemp("bases") / "llama", LlamaConfig, LlamaForCausalLM)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 of two layers whose head is its embeddings."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("bases") / "qwen2"
    return save_base(folder, Qwen2Config, Qwen2ForCausalLM, tie_word_embeddings=True)


def trained(
    base: Path,
    folder: Path,
    *,
    prepare: Callable[[Any], Any] = lambda model: None,
    before: Path | None = None,
    **more: Any,
) -> Any:
    """Train an adapter in one random step, save it, and return the model as it was trained: not as PEFT loads it.

    Args:
        base: folder of the base.
        folder: of the adapter.
        prepare: changes the base.
        before: folder for the adapter before it is trained, said to be one of the unchanged base.
        more: of LoRA's config.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(1)
    prepare(model)
    lora = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **more}
    adapted = get_peft_model(model, LoraConfig(**lora))
    if before is not None:
        settings = adapted.peft_config["default"]
        start, settings.init_lora_weights = settings.init_lora_weights, True
        adapted.save_pretrained(before)
        settings.init_lora_weights = start
    move(adapted, 0.05)
    adapted.save_pretrained(folder)
    return adapted


def more_rows(model: Any) -> None:
    """Add tokens, and round the rows up to a multiple of 64."""
    model.resize_token_embeddings(vocabulary() + 2, pad_to_multiple_of=64, mean_resizing=False)


def save_larger_tokenizer(folder: Path, count: int = 2) -> None:
    """Save a tokenizer with tokens of its own."""
    from transformers import AutoTokenizer

    save_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<|zebra_{number}|>" for number in range(count)], special_tokens=True)
    tokenizer.save_pretrained(folder)


def logits(model: Any) -> Any:
    """Return a model's logits on fixed tokens, those that SFT added among them."""
    import torch

    added = range(vocabulary(), min(vocabulary() + 2, model.get_input_embeddings().weight.shape[0]))
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([[*range(2, 24), *added, *range(30, 34)]])).logits.float()


def assert_same(folder: Path, model: Any, results: Path) -> Path:
    """Check that what a study loads of a folder computes what was trained; return the loaded folder."""
    found = resolved(folder, results)
    wanted = logits(model)
    assert (logits(loaded(found)) - wanted).abs().max() < 1e-4 * wanted.abs().max()
    return found


def refusal(folder: Path, results: Path) -> str:
    """Return the one line with which a folder is refused."""
    said = list(folder_problems(folder))
    if not said:
        with pytest.raises(UsageError) as refused:
            resolved(folder, results)
        said = str(refused.value).splitlines()
    assert len(said) == 1, said
    return said[0]


def leave(folder: Path, *names: str) -> None:
    """Put files into a folder that no loader reads."""
    for name in names:
        (folder / name).write_bytes(b"\x80\x02}q\x00.")


class TestTRL:
    """trl/scripts/sft.py, trl/trainer/sft_trainer.py, trl/chat_template_utils.py."""

    def test_a_whole_model(self, llama: Path, tmp_path: Path) -> None:
        """`trl sft` saves model and tokenizer with the trainer's arguments, and keeps the steps in folders."""
        folder = shutil.copytree(llama, tmp_path / "out")
        leave(folder, "training_args.bin", "README.md")
        step = shutil.copytree(folder, folder / "checkpoint-40")
        leave(step, "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
        for place in (folder, step):
            assert not list(folder_problems(place))
            assert resolved(place, tmp_path / "results") == place

    @pytest.mark.parametrize("task", ["CAUSAL_LM", None])
    def test_an_adapter_with_a_tokenizer_and_no_config(self, task: str | None, llama: Path, tmp_path: Path) -> None:
        """`trl sft --use_peft` takes lora_task_type, CAUSAL_LM; a LoraConfig of one's own often has none."""
        model = trained(llama, tmp_path / "out", task_type=task)
        save_tokenizer(tmp_path / "out")
        leave(tmp_path / "out", "training_args.bin", "README.md")
        assert not list(folder_problems(tmp_path / "out"))
        assert_same(tmp_path / "out", model, tmp_path / "results")

    def test_tokens_of_a_cloned_template(self, llama: Path, tmp_path: Path) -> None:
        """clone_chat_template rounds the rows up to 64; SFTTrainer trains the new ones and the whole head."""
        new = list(range(vocabulary(), vocabulary() + 2))
        more = {"trainable_token_indices": {"embed_tokens": new}, "modules_to_save": ["lm_head"]}
        model = trained(llama, tmp_path / "out", prepare=more_rows, target_modules=ATTENTION, **more)
        save_larger_tokenizer(tmp_path / "out")
        assert_same(tmp_path / "out", model, tmp_path / "results")

    def test_tokens_of_a_cloned_template_without_the_rows_that_were_not_trained(
        self, llama: Path, tmp_path: Path
    ) -> None:
        """PEFT leaves the embeddings out where it cannot reach the base's config: the trained rows are still there."""
        new = list(range(vocabulary(), vocabulary() + 2))
        more = {"trainable_token_indices": {"embed_tokens": new}, "modules_to_save": ["lm_head"]}
        model = trained(llama, tmp_path / "out", prepare=more_rows, target_modules=ATTENTION, **more)
        save_larger_tokenizer(tmp_path / "out")
        kept = ("lora_", "trainable_tokens_delta", "lm_head.weight")
        rewrite(tmp_path / "out", lambda found: {n: x for n, x in found.items() if any(k in n for k in kept)}, WEIGHTS)
        folder = assert_same(tmp_path / "out", model, tmp_path / "results")
        again = resolved(tmp_path / "out", tmp_path / "others")
        assert (folder / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()


class TestLLaMAFactory:
    """src/llamafactory/model/adapter.py, model/model_utils/embedding.py, train/callbacks.py, train/tuner.py."""

    @pytest.mark.parametrize("base", ["llama", "qwen"])
    def test_a_vocabulary_that_has_grown(self, base: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
        """resize_vocab makes both embeddings modules_to_save; PEFT then writes each of them three times."""
        modules = {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens", "lm_head"]}
        model = trained(request.getfixturevalue(base), tmp_path / "out", prepare=more_rows, **modules)
        save_larger_tokenizer(tmp_path / "out")
        leave(tmp_path / "out", "training_args.bin", "trainer_log.jsonl", "all_results.json", "training_loss.png")
        assert_same(tmp_path / "out", model, tmp_path / "results")

    def test_tokens_whose_rows_were_not_saved_are_refused(self, llama: Path, tmp_path: Path) -> None:
        trained(llama, tmp_path / "out", prepare=more_rows)
        save_larger_tokenizer(tmp_path / "out", count=3)
        rewrite(tmp_path / "out", lambda found: {n: x for n, x in found.items() if "lora_" in n}, WEIGHTS)
        said = refusal(tmp_path / "out", tmp_path / "results")
        assert "its tokenizer has 3 tokens more than its base (<|zebra_0|>, " in said
        assert "save_embedding_layers=True" in said

    @pytest.mark.parametrize("start", ["pissa", "olora"])
    def test_an_initialisation_that_changes_the_base_and_can_be_repeated(
        self, start: str, llama: Path, tmp_path: Path
    ) -> None:
        """pissa_init without pissa_convert: the adapter belongs to the base less its largest components."""
        model = trained(llama, tmp_path / "out", init_lora_weights=start)
        assert not list(folder_problems(tmp_path / "out"))
        assert_same(tmp_path / "out", model, tmp_path / "results")

    @pytest.mark.parametrize("start", ["pissa_niter_16", "loftq", "corda", "lora_ga"])
    def test_one_that_cannot_be_repeated_is_refused(self, start: str, llama: Path, tmp_path: Path) -> None:
        """pissa_iter is 16 by default, and each start from random numbers takes other components away."""
        trained(llama, tmp_path / "out", target_modules=ATTENTION)
        said = refusal(edit(tmp_path / "out", CONFIG, init_lora_weights=start), tmp_path / "results")
        assert f"init_lora_weights={start}) belongs to a base whose weights were changed" in said
        assert "pissa_convert: true" in said

    def test_what_pissa_convert_writes(self, llama: Path, tmp_path: Path) -> None:
        """PissaConvertCallback: the adapter before and after training, and the one of the unchanged base."""
        folder, first = tmp_path / "out", tmp_path / "out" / "pissa_init"

        model = trained(llama, folder, init_lora_weights="pissa_niter_16", before=first)
        settings = model.peft_config["default"]
        settings.init_lora_weights = True
        model.save_pretrained(folder / "pissa_backup")
        wanted = logits(model)
        settings.init_lora_weights = "pissa_niter_16"
        model.save_pretrained(folder / "pissa_converted", path_initial_model_for_weight_conversion=str(first))
        for place in (folder, first, folder / "pissa_backup"):
            assert refusal(place, tmp_path / "results").endswith(f"give {folder / 'pissa_converted'}")
        found = logits(loaded(resolved(folder / "pissa_converted", tmp_path / "results")))
        assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()

    def test_a_base_that_pissa_has_changed(self, llama: Path, tmp_path: Path) -> None:
        """scripts/pissa_init.py saves the changed base, and in it the adapter to begin with."""
        shutil.copytree(llama, tmp_path / "base")
        model = trained(tmp_path / "base", tmp_path / "base" / "pissa_init", target_modules=ATTENTION)
        assert not list(folder_problems(tmp_path / "base" / "pissa_init"))
        assert_same(tmp_path / "base" / "pissa_init", model, tmp_path / "results")

    def test_an_adapter_on_merged_adapters(self, llama: Path, tmp_path: Path) -> None:
        """With create_new_adapter the base that adapter_config.json names is the one below the merged adapters."""
        first, second = tmp_path / "first", tmp_path / "second"
        trained(llama, first, target_modules=ATTENTION)
        merged = resolved(first, tmp_path / "results")
        model = trained(merged, second, target_modules=ATTENTION)
        edit(second, CONFIG, base_model_name_or_path=str(llama))
        told = {"adapter_name_or_path": str(first), "create_new_adapter": True}
        (second / "training_args.yaml").write_text(yaml.safe_dump(told))  # webui/common.py
        said = refusal(second, tmp_path / "results")
        assert f"after the adapter {first} had been merged into the base (training_args.yaml: " in said
        assert_same(edit(second, CONFIG, base_model_name_or_path=str(first)), model, tmp_path / "results")

    def test_an_adapter_that_was_trained_on(self, llama: Path, tmp_path: Path) -> None:
        model = trained(llama, tmp_path / "out", target_modules=ATTENTION)
        (tmp_path / "out" / "training_args.yaml").write_text("adapter_name_or_path: saves/first\n")
        assert_same(tmp_path / "out", model, tmp_path / "results")

    def test_an_exported_model(self, llama: Path, tmp_path: Path) -> None:
        """export_model writes a Modelfile and pads on the left."""
        folder = shutil.copytree(llama, tmp_path / "out")
        (folder / "Modelfile").write_text("FROM .\n")
        edit(folder, "tokenizer_config.json", padding_side="left")
        assert not list(folder_problems(folder))
        assert resolved(folder, tmp_path / "results") == folder


class TestAxolotl:
    """src/axolotl/train.py, loaders/adapter.py, loaders/model.py, cli/merge_lora.py."""

    def test_an_adapter_beside_the_config_of_its_quantised_base(self, llama: Path, tmp_path: Path) -> None:
        """save_initial_configs writes the model's config, of a QLoRA with its quantisation, and no weights."""
        model = trained(llama, tmp_path / "out", use_rslora=True)
        shutil.copyfile(llama / "config.json", tmp_path / "out" / "config.json")
        edit(tmp_path / "out", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
        save_tokenizer(tmp_path / "out")
        shutil.copytree(llama, tmp_path / "out" / "merged")
        assert not list(folder_problems(tmp_path / "out"))
        assert_same(tmp_path / "out", model, tmp_path / "results")

    def test_rows_of_added_tokens(self, llama: Path, tmp_path: Path) -> None:
        """The loader adds rows for the tokenizer's tokens; PEFT saves both embeddings as it sees them."""
        model = trained(llama, tmp_path / "out", prepare=more_rows)
        save_larger_tokenizer(tmp_path / "out")
        assert_same(tmp_path / "out", model, tmp_path / "results")

    def test_replicated_layers(self, llama: Path, tmp_path: Path) -> None:
        """peft_layer_replication: layers share their weights and have adapters of their own."""
        model = trained(llama, tmp_path / "out", layer_replication=[[0, 2], [1, 2]])
        folder = assert_same(tmp_path / "out", model, tmp_path / "results")
        assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == 3

    def test_adapters_of_experts(self, tmp_path: Path) -> None:
        """lora_target_parameters: the weights of a mixture's experts are parameters and no modules."""
        from transformers import MixtralConfig, MixtralForCausalLM

        base = save_base(tmp_path / "base", MixtralConfig, MixtralForCausalLM)
        experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        model = trained(base, tmp_path / "out", target_parameters=experts, target_modules=ATTENTION)
        assert_same(tmp_path / "out", model, tmp_path / "results")

    def test_a_template_in_the_tokenizers_config(self, llama: Path, tmp_path: Path) -> None:
        """tokenizer_save_jinja_files: false keeps the template in tokenizer_config.json."""
        from transformers import AutoTokenizer

        trained(llama, tmp_path / "out", target_modules=ATTENTION)
        save_tokenizer(tmp_path / "out", chat=False)
        edit(tmp_path / "out", "tokenizer_config.json", chat_template="{{ messages[0].content }}")
        folder = resolved(tmp_path / "out", tmp_path / "results")
        assert AutoTokenizer.from_pretrained(folder).chat_template == "{{ messages[0].content }}"

    def test_architectures_whose_first_letters_were_taken_away(self, tmp_path: Path) -> None:
        """After FSDP the letters F, S, D and P are stripped from the front of the class: Phi3 becomes hi3."""
        from transformers import Phi3Config, Phi3ForCausalLM

        base = save_base(tmp_path / "out", Phi3Config, Phi3ForCausalLM, pad_token_id=0)
        edit(base, architectures=["hi3ForCausalLM"])
        assert not list(folder_problems(base))
        assert resolved(base, tmp_path / "results") == base
        assert not check_weights(base, named="x", about=["phi"], cache=tmp_path / "cache")

    @pytest.mark.parametrize("kind", ["an adapter", "a whole model"])
    def test_a_run_that_has_not_ended(self, kind: str, llama: Path, tmp_path: Path) -> None:
        """Configs and tokenizer are saved before training: without an end they are all that the folder has."""
        folder = tmp_path / "out"
        save_tokenizer(folder)
        shutil.copyfile(llama / "config.json", folder / "config.json")
        if kind == "an adapter":
            for step in ("checkpoint-80", "checkpoint-120"):
                trained(llama, folder / step, target_modules=ATTENTION)
            shutil.copyfile(folder / "checkpoint-80" / CONFIG, folder / CONFIG)
        else:
            shutil.copytree(llama, folder / "checkpoint-120")
        said = refusal(folder, tmp_path / "results")
        assert "as where training has not ended" in said
        assert said.endswith(f"give one, such as {folder / 'checkpoint-120'}")

    def test_an_adapter_in_parts(self, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """What FSDP gathered is renamed from model-... to adapter_model-...; the command in the message joins it."""
        from safetensors.torch import load_file, save_file

        folder = tmp_path / "out"
        model = trained(llama, folder, target_modules=ATTENTION)
        tensors = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        for number in range(2):
            part = {name: tensors[name] for name in sorted(tensors)[number::2]}
            save_file(part, folder / f"adapter_model-0000{number + 1}-of-00002.safetensors")
        said = refusal(folder, tmp_path / "results")
        assert "its adapter is in parts (adapter_model-00001-of-00002.safetensors, ...)" in said
        command = re.search(r'python -c "(.*)"', said)
        assert command is not None
        monkeypatch.chdir(folder)
        exec(command[1], {})
        assert_same(folder, model, tmp_path / "results")

    def test_an_adapter_in_the_parts_of_several_processes(self, llama: Path, tmp_path: Path) -> None:
        """SHARDED_STATE_DICT: pytorch_model_fsdp_0 holds the adapter alone."""
        folder = tmp_path / "out"
        trained(llama, folder, target_modules=ATTENTION)
        (folder / WEIGHTS).unlink()
        (folder / "pytorch_model_fsdp_0").mkdir()
        (folder / "pytorch_model_fsdp_0" / "__0_0.distcp").write_bytes(b"")
        said = refusal(folder, tmp_path / "results")
        assert f"its adapter is FSDP's parts of several processes; run accelerate merge-weights {folder}" in said
        assert f"rename NEW/model.safetensors to {WEIGHTS}" in said


class TestUnsloth:
    """unsloth/save.py, unsloth/models/llama.py, models/mapper.py; unsloth_zoo/saving_utils.py and hf_utils.py."""

    def lora(self, base: Path, folder: Path) -> Any:
        """Save with save_method="lora": a regular expression as target, and a mapping of its own."""
        pattern = r"(?:.*?(?:layers).*?(?:self_attn|mlp).*?(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj))"
        model = trained(base, folder, target_modules=pattern)
        mapping = {"base_model_class": "Qwen2ForCausalLM", "parent_library": "transformers.models.qwen2.modeling_qwen2"}
        edit(folder, CONFIG, auto_mapping={**mapping, "unsloth_fixed": True})
        save_tokenizer(folder)
        edit(folder, "tokenizer_config.json", padding_side="left")
        return model

    def test_an_adapter(self, qwen: Path, tmp_path: Path) -> None:
        model = self.lora(qwen, tmp_path / "out")
        assert_same(tmp_path / "out", model, tmp_path / "results")

    @pytest.mark.parametrize("name", ["unsloth/zebra-1B-unsloth-bnb-4bit", "unsloth/zebra-1b-bnb-4bit"])
    def test_one_on_a_base_in_4_bits_is_refused_before_a_download(
        self, name: str, qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def download(*_args: Any, **_more: Any) -> None:
            pytest.fail("the base was about to be downloaded")

        self.lora(qwen, tmp_path / "out")
        monkeypatch.setattr("huggingface_hub.snapshot_download", download)
        said = refusal(edit(tmp_path / "out", CONFIG, base_model_name_or_path=name), tmp_path / "results")
        full = in_full_precision(name)
        assert full.lower() == "unsloth/zebra-1b"
        assert (
            f"trained on {name}, a quantised copy of a model; write the model in full precision into {CONFIG}" in said
        )
        assert f"by its Hub id ({full}) or its folder" in said

    def test_one_on_a_base_on_the_hub_that_is_quantised_by_its_config(
        self, qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of such a base the config alone is downloaded."""
        asked = []
        (tmp_path / "hub").mkdir()
        shutil.copyfile(qwen / "config.json", tmp_path / "hub" / "config.json")
        edit(tmp_path / "hub", quantization_config={"quant_method": "mxfp4"})

        def download(*_args: Any, allow_patterns: list[str], **_more: Any) -> str:
            asked.extend(allow_patterns)
            return str(tmp_path / "hub")

        self.lora(qwen, tmp_path / "out")
        monkeypatch.setattr("huggingface_hub.snapshot_download", download)
        said = refusal(edit(tmp_path / "out", CONFIG, base_model_name_or_path="zebra/moe"), tmp_path / "results")
        assert "trained on zebra/moe, a quantised copy of a model" in said
        assert asked == ["config.json"]

    def test_merged_in_16_bits(self, qwen: Path, tmp_path: Path) -> None:
        """merged_16bit writes into the base's own parts, with torch_dtype and without a version."""
        import torch
        from transformers import AutoModelForCausalLM

        folder = tmp_path / "out"
        model = AutoModelForCausalLM.from_pretrained(qwen, dtype=torch.bfloat16)
        model.save_pretrained(folder, max_shard_size="20KB")
        save_tokenizer(folder)
        template = (folder / "chat_template.jinja").read_text()
        edit(folder, "tokenizer_config.json", chat_template=template, padding_side="left")
        edit(
            folder, dtype=None, torch_dtype="bfloat16", transformers_version=None, unsloth_version="2", unsloth_fixed=True
        )  # fmt: skip
        assert len(list(folder.glob("model-*.safetensors"))) > 1
        assert not list(folder_problems(folder))
        assert resolved(folder, tmp_path / "results") == folder
        assert not check_weights(folder, named="x", about=["16"], cache=tmp_path / "cache")
        assert logits_of(loaded(folder)).equal(logits_of(model.float()))

    def test_merged_in_4_bits_is_refused_in_one_line(self, qwen: Path, tmp_path: Path) -> None:
        """merged_4bit_forced: bytes for weights, beside what bitsandbytes needs to read them."""
        import torch

        folder = shutil.copytree(qwen, tmp_path / "out")
        bits = {"quant_method": "bitsandbytes", "load_in_4bit": True, "llm_int8_skip_modules": None}
        edit(folder, quantization_config=bits)
        name = "model.layers.0.mlp.up_proj.weight"
        more = {name: torch.zeros(8, 1, dtype=torch.uint8), f"{name}.absmax": torch.zeros(1, dtype=torch.uint8)}
        rewrite(folder, lambda found: found | more)
        said = refusal(folder, tmp_path / "results")
        assert "its weights are quantised (config.json: quantization_config, bitsandbytes load_in_4bit)" in said

    def test_pickled_weights_of_a_machine_with_two_cores(self, qwen: Path, tmp_path: Path) -> None:
        """unsloth_save_model leaves safetensors aside where there are two cores or fewer."""
        folder = shutil.copytree(qwen, tmp_path / "out")
        (folder / "model.safetensors").unlink()
        leave(folder, "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")
        said = refusal(folder, tmp_path / "results")
        assert "its weights are pickled (pytorch_model-00001-of-00002.bin)" in said


class TestTorchtune:
    """torchtune/training/checkpointing/_checkpointer.py, models/convert_weights.py; recipes/lora_finetune_*.py."""

    def adapter(self, base: Path, folder: Path, **more: Any) -> Any:
        """Save as save_checkpoint does: few settings, a folder without content, files of the base."""
        model = trained(base, folder, target_modules=ATTENTION, **more)
        about = {"r": 4, "lora_alpha": 16, "target_modules": ATTENTION, "peft_type": "LORA"}
        (folder / CONFIG).write_text(json.dumps({**about, "base_model_name_or_path": str(base)}))
        (folder / "adapter_model").mkdir()
        leave(folder, "adapter_model.pt")
        shutil.copyfile(base / "config.json", folder / "config.json")
        save_tokenizer(folder)
        return model

    def test_an_adapter_alone(self, llama: Path, tmp_path: Path) -> None:
        model = self.adapter(llama, tmp_path / "epoch_0")
        assert not list(folder_problems(tmp_path / "epoch_0"))
        assert_same(tmp_path / "epoch_0", model, tmp_path / "results")

    def test_dora_that_the_settings_do_not_name(self, llama: Path, tmp_path: Path) -> None:
        """The magnitudes are saved and use_dora is not; their names have no `.weight`."""
        folder = tmp_path / "epoch_0"
        model = self.adapter(llama, folder, use_dora=True)
        end = "lora_magnitude_vector"
        rewrite(folder, lambda found: {n.replace(f"{end}.weight", end): x for n, x in found.items()}, WEIGHTS)
        said = refusal(folder, tmp_path / "results")
        assert "its adapter has the magnitudes of DoRA" in said
        assert said.endswith("write use_dora: true there")
        assert_same(edit(folder, CONFIG, use_dora=True), model, tmp_path / "results")

    def test_merged_weights_with_their_adapter_are_refused_with_what_to_move(self, llama: Path, tmp_path: Path) -> None:
        """By default both are saved: transformers would put the adapter on the weights that have it already."""
        folder = tmp_path / "epoch_0"
        self.adapter(llama, folder)
        merged = resolved(folder, tmp_path / "results")
        shutil.copyfile(merged / "model.safetensors", folder / "model.safetensors")
        said = refusal(folder, tmp_path / "results")
        assert f"To train from the weights alone, move {CONFIG} and {WEIGHTS} away" in said
        for name in (CONFIG, WEIGHTS):
            (folder / name).unlink()
        assert resolved(folder, tmp_path / "results") == folder

    def test_the_folder_above_names_its_epochs(self, llama: Path, tmp_path: Path) -> None:
        shutil.copytree(llama, tmp_path / "out" / "epoch_0")
        shutil.copytree(llama, tmp_path / "out" / "epoch_1")
        (tmp_path / "out" / "recipe_state").mkdir()
        said = refusal(tmp_path / "out", tmp_path / "results")
        assert said.endswith(f"give one, such as {tmp_path / 'out' / 'epoch_1'}")


def test_a_template_that_a_processor_saved_is_the_tokenizers(llama: Path, tmp_path: Path) -> None:
    """Processors of earlier versions wrote chat_template.json, which no tokenizer reads."""
    from transformers import AutoTokenizer

    trained(llama, tmp_path / "out", target_modules=ATTENTION)
    save_tokenizer(tmp_path / "out", chat=False)
    (tmp_path / "out" / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages[0].content }}"}))
    folder = resolved(tmp_path / "out", tmp_path / "results")
    assert AutoTokenizer.from_pretrained(folder).chat_template == "{{ messages[0].content }}"
