"""SFT checkpoints as people have them, at tiny size: whole models of several architectures, and adapters on them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.config.paths import embedded_dir
from tests.conftest import tiny_model

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def vocabulary() -> int:
    """Return the number of tokens of the embedded study's tokenizer, which all these checkpoints have."""
    return int(json.loads((embedded_dir() / "config.json").read_text())["vocab_size"])


def save_tokenizer(folder: Path, *, chat: bool = True) -> None:
    """Put the embedded study's tokenizer into a folder; without its chat template where `chat` is False."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER[: 3 if chat else 2]:
        shutil.copyfile(embedded_dir() / name, folder / name)


def save_base(folder: Path, config_class: Any = None, model_class: Any = None, **more: Any) -> Path:
    """Save an untrained model of two layers with a tokenizer."""
    model = tiny_model(config_class, model_class, **{"vocab_size": vocabulary(), **more})
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_adapter(
    base: Path, folder: Path, *, config: Any = None, prepare: Callable[[Any], Any] = lambda model: None, **more: Any
) -> Path:
    """Save an adapter on a base whose every weight is random, so that it changes what the model says.

    Args:
        base: folder of the base.
        folder: of the adapter.
        config: PEFT's config; None for LoRA on all linear layers.
        prepare: changes the base before the adapter is put on it.
        more: replaces fields of LoRA's config.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    prepare(model)
    lora = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    torch.manual_seed(1)
    adapted = get_peft_model(model, config or LoraConfig(**{**lora, **more}))
    move(adapted, 0.1)
    adapted.save_pretrained(folder)
    return folder


def move(adapted: Any, scale: float) -> None:
    """Move the trained weights away from their start, as a training does."""
    import torch

    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * scale)


def rewrite(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]], name: str = "model.safetensors") -> Path:
    """Replace the tensors of a safetensors file."""
    from safetensors.torch import load_file, save_file

    save_file(change(load_file(folder / name)), folder / name, metadata={"format": "pt"})
    return folder


def edit(folder: Path, name: str = "config.json", **values: Any) -> Path:
    """Change entries of a JSON file; None takes an entry away."""
    path = folder / name
    found = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in found.items() if value is not None}))
    return folder


def logits_of(model: Any) -> Any:
    """Return a model's logits on fixed tokens."""
    import torch

    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(2, 30)[None]).logits.float()
