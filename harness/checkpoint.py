"""The SFT checkpoint: where it is, what identifies it, and how its weights are loaded. Safetensors only."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from harness.config import EMBEDDED, ModelConfig, Precision, RunConfig, Tuning
from harness.records import UsageError, digest, file_sha256

_WANTED = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.txt")


def checkpoint_dir(model: ModelConfig) -> Path:
    """Return the checkpoint's folder; a Hub id is fetched first (weights in safetensors, no code)."""
    if model.path == EMBEDDED:
        from harness.embedded import study_dir

        return study_dir()
    folder = Path(model.path)
    return folder.resolve() if folder.is_dir() else _fetch(model.path, model.revision)


@lru_cache
def _fetch(hub_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=list(_WANTED)))
    except Exception as error:  # the Hub's client raises many kinds: no such model, no network, no permission
        raise UsageError(
            f"model.path={hub_id}: not to be had from the Hub at revision {revision or 'main'} "
            f"({type(error).__name__}: {error}); check the name, or download it and give the folder"
        ) from error


@lru_cache
def base_sha256(folder: Path) -> str:
    """Identify the weights by the bytes of all safetensors files."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UsageError(f"{folder}: no *.safetensors; pickled weights are not loaded, save it with save_pretrained")
    return digest([[path.name, file_sha256(path)] for path in files])


@lru_cache
def _tokenizer_sha256(folder: Path) -> str:
    """Identify the configs and the tokenizer beside the weights."""
    files = sorted(p for p in folder.iterdir() if p.suffix in (".json", ".jinja", ".model", ".txt"))
    return digest([[path.name, file_sha256(path)] for path in files if path.name != "card.json"])


def contents_sha256(config: RunConfig, data_facts: dict[str, Any]) -> dict[str, str]:
    """Identify what a config only names: weights, tokenizer, chat template, and the files of each split."""
    folder = checkpoint_dir(config.model)
    contents = {"base": base_sha256(folder), "tokenizer": _tokenizer_sha256(folder)}
    if config.model.chat_template is not None:
        contents["chat_template"] = file_sha256(Path(config.model.chat_template))
    for split in ("train", "dev", "golden"):
        if split in data_facts:
            contents[split] = data_facts[split]["sha256"]
    return contents


def has_gpu() -> bool:
    """Return True where torch can use a CUDA device."""
    import torch

    return bool(torch.cuda.is_available())


def set_threads(config: RunConfig) -> None:
    """Give torch the number of threads asked for; null leaves torch's own choice."""
    import torch

    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)


def uses_bf16(config: RunConfig) -> bool:
    """Return True where matrix products run in bf16: asked for, or on a GPU that has it (on a CPU it is slower)."""
    import torch

    if config.train.precision is Precision.auto:
        return has_gpu() and torch.cuda.is_bf16_supported()
    return config.train.precision is Precision.bf16


def load_base(config: RunConfig) -> Any:
    """Load the base's weights: fp32 on a CPU; in bf16 where only an adapter is trained on top of it."""
    import torch

    dtype = torch.bfloat16 if uses_bf16(config) and config.train.tuning is Tuning.lora else torch.float32
    return _load_model(checkpoint_dir(config.model), dtype)


def _load_model(folder: Path, dtype: Any) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # a bar for each of a hundred loads tells nothing
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False, use_safetensors=True)
    return model.to("cuda") if has_gpu() else model


def load_policy(config: RunConfig, folder: Path) -> Any:
    """Load what a trial has trained: its full model, or the base with its adapter.

    In fp32 the adapter is merged into the weights, which makes generation faster; in bf16 merging would round away a
    small adapter, so it stays apart.
    """
    import torch

    if (folder / "model").is_dir():
        return _load_model(folder / "model", torch.float32)
    from peft import PeftModel

    base = load_base(config)
    policy = PeftModel.from_pretrained(base, folder / "adapter")
    return policy.merge_and_unload() if base.dtype == torch.float32 else policy
