"""What `python -m harness.sweep` says of SFT folders that cannot be trained: one line, status 2, and no trial starts."""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import harness.sweep.app
from harness.config.paths import embedded_dir
from tests.train.sft_folders import edit, rewrite, save_adapter, save_base

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
DATA = [f"data.{split}={embedded_dir()}/{split}.jsonl" for split in ("train", "dev", "golden")]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base and an adapter on it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    place = tmp_path_factory.mktemp("given")
    save_base(place / "base", LlamaConfig, LlamaForCausalLM)
    save_adapter(place / "base", place / "sft", target_modules=["q_proj"])
    return place


def renamed(folder: Path, old: str, new: str) -> None:
    """Rename a file."""
    (folder / old).rename(folder / new)


def empty(folder: Path, *names: str) -> None:
    """Put files without content into a folder."""
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"")


def of_other_layers(folder: Path) -> None:
    """Leave an adapter with tensors that its base has no place for."""
    rewrite(folder, lambda found: {name.replace("layers.1", "layers.7"): x for name, x in found.items()}, WEIGHTS)


def in_parts(folder: Path) -> None:
    """Leave a whole model's weights in the parts of several processes."""
    (folder / "model.safetensors").unlink()
    empty(folder, "zero_to_fp32.py")


BASE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "GGUF": (
        lambda folder: renamed(folder, "model.safetensors", "model-q4_k_m.gguf"),
        "model-q4_k_m.gguf is GGUF, made for llama.cpp and mostly quantised; give the safetensors that it was made",
    ),
    "pickled weights": (
        lambda folder: renamed(folder, "model.safetensors", "pytorch_model.bin"),
        "its weights are pickled (pytorch_model.bin); pickled weights are not loaded",
    ),
    "parts of several processes": (in_parts, "its weights are DeepSpeed's parts of several processes; in that folder"),
    "quantised weights": (
        lambda folder: edit(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        "its weights are quantised (config.json: quantization_config, bitsandbytes load_in_4bit); give the same",
    ),
    "a classifier": (
        lambda folder: edit(folder, architectures=["LlamaForSequenceClassification"]),
        "config.json says architectures=LlamaForSequenceClassification, which is no language model",
    ),
    "a layer that is missing": (
        lambda folder: rewrite(folder, lambda found: {name: x for name, x in found.items() if "layers.1" not in name}),
        " of the model are not in its files, and would be random; save the whole model again",
    ),
    "a layer too many": (
        lambda folder: edit(folder, num_hidden_layers=1),
        "of layers that config.json does not have, and would be left out",
    ),
    "numbers that are none": (
        lambda folder: rewrite(folder, lambda found: {name: x * float("nan") for name, x in found.items()}),
        "are NaN or infinite; its training has diverged, or the file is damaged",
    ),
    "an architecture that nobody has": (
        lambda folder: edit(folder, model_type="zebra"),
        "cannot be read: transformers",
    ),
}
ADAPTER: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a base in 4 bits": (
        lambda folder: edit(folder, CONFIG, base_model_name_or_path="unsloth/zebra-3B-Instruct-bnb-4bit"),
        "its adapter was trained on unsloth/zebra-3B-Instruct-bnb-4bit, a quantised copy of a model; write the model "
        f"in full precision into {CONFIG} as base_model_name_or_path, by its Hub id (unsloth/zebra-3B-Instruct) or",
    ),
    "a base that is gone": (
        lambda folder: edit(folder, CONFIG, base_model_name_or_path="/root/base"),
        "its adapter was trained on /root/base (adapter_config.json: base_model_name_or_path), and there is no such",
    ),
    "no base": (lambda folder: edit(folder, CONFIG, base_model_name_or_path=None), "names no base"),
    "a base that another adapter was merged into": (
        lambda folder: (folder / "training_args.yaml").write_text("adapter_name_or_path: a,b\n"),
        "it was trained after the adapter a had been merged into the base (training_args.yaml: adapter_name_or_path)",
    ),
    "prompt tuning": (lambda folder: edit(folder, CONFIG, peft_type="PREFIX_TUNING"), "cannot be merged into a model"),
    "a start from random components": (
        lambda folder: edit(folder, CONFIG, init_lora_weights="pissa_niter_16"),
        "init_lora_weights=pissa_niter_16) belongs to a base whose weights were changed before training",
    ),
    "a pickled adapter": (
        lambda folder: renamed(folder, WEIGHTS, "adapter_model.bin"),
        "its adapter is pickled (adapter_model.bin), which is not loaded; in that folder run python -c",
    ),
    "an adapter in parts": (
        lambda folder: renamed(folder, WEIGHTS, "adapter_model-00001-of-00002.safetensors"),
        "its adapter is in parts (adapter_model-00001-of-00002.safetensors, ...), which PEFT does not read",
    ),
    "a run that has not ended": (
        lambda folder: (shutil.copytree(folder, folder / "checkpoint-7"), (folder / WEIGHTS).unlink()),
        "as where training has not ended; the folder holds checkpoints of it: give one, such as",
    ),
    "tensors of another base": (of_other_layers, "does not fit the base"),
    "weights and an adapter of others": (
        lambda folder: (
            [
                shutil.copyfile(folder.parent / "base" / name, folder / name)
                for name in ("config.json", "model.safetensors", "tokenizer.json")
            ]
            and edit(folder, CONFIG, base_model_name_or_path="zebra/other")
        ),
        "the folder holds weights and an adapter, and the adapter belongs to zebra/other",
    ),
}


@pytest.fixture
def refused(
    given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[str, Callable[[Path], Any]], str]:
    """Spoil a copy of a folder, start a sweep on it, and return what the command says, of the folder's own message."""

    def no_trial(*_args: Any, **_more: Any) -> None:
        pytest.fail("a study was about to start")

    def run(kind: str, spoil: Callable[[Path], Any]) -> str:
        for name in ("base", "sft"):
            shutil.copytree(given / name, tmp_path / name)
        folder = tmp_path / kind
        if kind == "sft":
            edit(folder, CONFIG, base_model_name_or_path="../base")
        spoil(folder)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(harness.sweep.app, "run_study", no_trial)
        command = ["+method=simpo,dpo", "seed=1", f"model.path={folder}", f"results_dir={tmp_path}/results", *DATA]
        monkeypatch.setattr(sys, "argv", ["harness.sweep", *command])
        with pytest.raises(SystemExit) as stop:
            importlib.import_module("harness.sweep.__main__").main()
        out, said = capsys.readouterr()
        assert stop.value.code == 2, said
        assert "Traceback" not in said + out
        lines = [line for line in said.splitlines() if not line.startswith("merging the adapter ")]
        assert len(lines) == 1, said
        start = f"harness.sweep: model.path={folder}: "
        assert lines[0].startswith(start)
        assert not list(tmp_path.glob("results/*/study.yaml"))
        return lines[0].removeprefix(start)

    return run


@pytest.mark.parametrize("case", BASE)
def test_a_whole_model_is_refused_in_one_line(case: str, refused: Callable[..., str]) -> None:
    spoil, message = BASE[case]
    assert message in refused("base", spoil)


@pytest.mark.parametrize("case", ADAPTER)
def test_an_adapter_is_refused_in_one_line(case: str, refused: Callable[..., str]) -> None:
    spoil, message = ADAPTER[case]
    assert message in refused("sft", spoil)
