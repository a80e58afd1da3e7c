"""What a checkpoint's folder holds: every form that people have is trained, or named with what to give instead."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.config.checkpoint import Checkpoints, folder_problems, problems
from harness.config.paths import embedded_dir, expand_home
from harness.config.schema import ModelConfig, RunConfig
from harness.study.errors import UsageError
from harness.study.files import digest, file_sha256
from harness.sweep.problems import load_run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole checkpoint, to be changed."""
    shutil.copytree(embedded_dir(), tmp_path / "sft", ignore=shutil.ignore_patterns("*.jsonl", "card.json"))
    return tmp_path / "sft"


def files(*names: str, without: tuple[str, ...] = ("model.safetensors",)) -> Callable[[Path], None]:
    """Take files away and put others there."""

    def change(folder: Path) -> None:
        for name in without:
            (folder / name).unlink()
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(b"x")

    return change


def config(**values: Any) -> Callable[[Path], None]:
    """Change entries of config.json."""

    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def tensors(**entries: Any) -> Callable[[Path], None]:
    """Write a safetensors file whose header has these entries, each of two bytes."""

    def change(folder: Path) -> None:
        found = {
            name: {"dtype": dtype, "shape": [2], "data_offsets": [2 * number, 2 * number + 2]}
            for number, (name, dtype) in enumerate(entries.items())
        }
        header = json.dumps(found).encode()
        path = folder / "model.safetensors"
        path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 2 * len(found))

    return change


def two_sets(folder: Path) -> None:
    """Put shards and their index beside the single file."""
    shutil.copyfile(folder / "model.safetensors", folder / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')


def inside(name: str) -> Callable[[Path], None]:
    """Move the whole checkpoint into folders of its own, as a trainer's output has them."""

    def change(folder: Path) -> None:
        for number in (500, 1000):
            shutil.copytree(folder, folder / f"{name}{number}", ignore=shutil.ignore_patterns(f"{name}*"))
        for path in folder.iterdir():
            if path.is_file():
                path.unlink()

    return change


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "GGUF": (files("model-Q4_K_M.gguf", without=("model.safetensors", "config.json")), "model-Q4_K_M.gguf is GGUF"),
    "GGUF beside a config": (files("m.gguf"), "run pip install gguf and python -c"),
    "a pickle of transformers": (files("pytorch_model.bin"), "weights are pickled (pytorch_model.bin)"),
    "pickles in parts": (
        files("pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"),
        "sft'); m.save_pretrained('NEW')",
    ),
    "a pickle of Meta's": (files("consolidated.00.pth"), "consolidated.00.pth is pickled, and not as transformers"),
    "a pickle of Lightning's": (files("last.ckpt"), "last.ckpt is pickled"),
    "DeepSpeed's parts": (
        files("zero_to_fp32.py", "global_step20/mp_rank_00_model_states.pt"),
        "python zero_to_fp32.py . NEW --safe_serialization",
    ),
    "FSDP's parts": (files("pytorch_model_fsdp_0/__0_0.distcp"), "accelerate merge-weights"),
    "a trainer's output": (inside("checkpoint-"), "sft/checkpoint-1000"),
    "nothing": (files(without=("model.safetensors", "config.json")), "has no config.json"),
    "an adapter without its config": (
        files("adapter_model.safetensors", without=("model.safetensors", "config.json")),
        "adapter_model.safetensors without adapter_config.json",
    ),
    "another name": (files("model.fp16.safetensors"), "neither model.safetensors nor model.safetensors.index.json"),
    "parts without their index": (files("model-00001-of-00002.safetensors"), "which say what is loaded"),
    "two sets of weights": (two_sets, "two sets of weights"),
    "an index that is no JSON": (files("model.safetensors.index.json", without=()), "index.json is not readable"),
    "a reward model": (config(architectures=["Qwen2ForSequenceClassification"]), "is no language model"),
    "a masked model": (config(architectures=["RobertaForMaskedLM"]), "is no language model"),
    "an encoder-decoder": (config(is_encoder_decoder=True), "is an encoder-decoder model"),
    "GPTQ": (config(quantization_config={"quant_method": "gptq", "bits": 4}), "quantised (config.json: quant"),
    "AWQ": (config(quantization_config={"quant_method": "awq"}), "awq"),
    "FP8": (config(quantization_config={"quant_method": "fp8"}), "in bf16, fp16 or fp32"),
    "bitsandbytes": (
        config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        "bitsandbytes load_in_4bit",
    ),
    "quantised within a multimodal model": (
        config(text_config={"quantization_config": {"quant_method": "mxfp4"}}),
        "mxfp4",
    ),
    "8 bits that nothing tells of": (
        tensors(**{"model.embed_tokens.weight": "BF16", "model.layers.0.mlp.up_proj.weight": "F8_E4M3"}),
        "tensor model.layers.0.mlp.up_proj.weight is no bf16",
    ),
    "whole numbers": (tensors(**{"lm_head.weight": "I8"}), "tensor lm_head.weight is no bf16"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_folder_that_cannot_be_trained_is_named_with_what_to_give(case: str, folder: Path) -> None:
    change, message = REFUSED[case]
    change(folder)
    found = list(folder_problems(folder))
    assert found, case
    assert message in found[0]
    assert all("\n" not in text for text in found)


HARMLESS: dict[str, Callable[[Path], None]] = {
    "masks as bytes": tensors(**{"h.0.attn.bias": "U8", "h.0.attn.weight": "F16"}),
    "what trainers leave": files(
        *("trainer_state.json", "training_args.bin", "optimizer.pt", "README.md", "all_results.json"),
        *("checkpoint-20/model.safetensors", "runs/events", "rng_state.pth"),
        without=(),
    ),
    "no quantisation": config(quantization_config=None),
}


@pytest.mark.parametrize("case", HARMLESS)
def test_what_does_no_harm_is_no_problem(case: str, folder: Path) -> None:
    HARMLESS[case](folder)
    assert list(folder_problems(folder)) == []


@pytest.mark.parametrize("name", ["model.gguf", "model.safetensors", "pytorch_model.bin"])
def test_a_single_file_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"x")
    found = list(problems(RunConfig(model=ModelConfig(str(tmp_path / name)))))
    assert len(found) == 1
    assert ("is GGUF" if name.endswith("gguf") else "give the folder of a checkpoint") in found[0]


def test_a_pickled_adapter_is_named_with_the_command_that_converts_it(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "embedded"}')
    (tmp_path / "adapter_model.bin").write_bytes(b"x")
    (found,) = folder_problems(tmp_path)
    assert "adapter_model.bin" in found
    assert "weights_only=True" in found


def test_the_hash_of_plain_weights_stays_what_it_was(folder: Path) -> None:
    weights = folder / "model.safetensors"
    assert Checkpoints().base_sha256(folder) == digest([[weights.name, file_sha256(weights)]])


def test_a_checkpoint_that_says_it_was_derived_is_hashed_like_any_other(folder: Path) -> None:
    """Only the cache's own are known by their sources: a copy may have been changed."""
    before = Checkpoints().base_sha256(folder)
    (folder / "derived.json").write_text('{"base_sha256": "0"}')
    assert Checkpoints().base_sha256(folder) == before


def test_an_adapter_that_was_never_merged_says_which_command_does_it(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "embedded"}')
    tensors()(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "adapter_model.safetensors")
    with pytest.raises(UsageError, match=r"is not there; run harness.sweep or harness.train"):
        Checkpoints().folder(ModelConfig(str(tmp_path)), str(tmp_path / "results"))


def test_the_home_folder_may_be_written_short(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("train", "golden", "dev"):
        shutil.copyfile(embedded_dir() / f"{name}.jsonl", tmp_path / f"{name}.jsonl")
    (tmp_path / "chat.jinja").write_text("{{ messages }}")
    (tmp_path / "answers.json").write_text("[]")
    (tmp_path / "mine.py").write_text("def score(prompt, answer): return 1.0")
    data = [f"data.{name}=~/{name}.jsonl" for name in ("train", "golden", "dev")]
    folders = ["model.path=~/sft", "model.chat_template=~/chat.jinja", "results_dir=~/results", *data]
    found = load_run(["+method=dpo", *folders, "score.scorers=[~/mine.py]", "score.baseline=~/answers.json"])
    home = str(tmp_path)
    assert (found.model.path, found.model.chat_template) == (f"{home}/sft", f"{home}/chat.jinja")
    assert (found.data.train, found.data.golden, found.data.dev) == tuple(
        f"{home}/{name}.jsonl" for name in ("train", "golden", "dev")
    )
    assert (found.results_dir, found.score.baseline) == (f"{home}/results", f"{home}/answers.json")
    assert found.score.scorers == [f"{home}/mine.py"]


def test_other_texts_are_not_changed() -> None:
    given = RunConfig(model=ModelConfig("owner/name~1"))
    expand_home(given)
    assert given == RunConfig(model=ModelConfig("owner/name~1"))
