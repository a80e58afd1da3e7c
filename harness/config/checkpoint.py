"""The SFT checkpoint: its folder, the hashes that identify it, and what is wrong with it. Loads no weights."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from harness.config.paths import embedded_dir
from harness.config.schema import EMBEDDED, ModelConfig, RunConfig
from harness.study.errors import UnreachableError, UsageError
from harness.study.files import digest, file_sha256

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_WANTED = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.txt")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


class Checkpoints:
    """Folders and hashes of checkpoints: each is downloaded and hashed once per instance."""

    def __init__(self) -> None:
        self._folders: dict[tuple[str, str | None], Path] = {}
        self._weights: dict[Path, str] = {}
        self._tokenizers: dict[Path, str] = {}

    def folder(self, model: ModelConfig) -> Path:
        """Return the checkpoint's folder; a Hub id is downloaded first (weights in safetensors, no code).

        Raises:
            UnreachableError: for a Hub id that cannot be downloaded.
        """
        if model.path == EMBEDDED:
            return embedded_dir()
        key = (model.path, model.revision)
        if key not in self._folders:
            folder = Path(model.path)
            self._folders[key] = folder.resolve() if folder.is_dir() else _download(model.path, model.revision)
        return self._folders[key]

    def base_sha256(self, folder: Path) -> str:
        """Return the hash of the weights: of the bytes of all safetensors files.

        Raises:
            UsageError: for a folder without safetensors files.
        """
        if folder not in self._weights:
            self._weights[folder] = _weights_sha256(folder)
        return self._weights[folder]

    def tokenizer_sha256(self, folder: Path) -> str:
        """Return the hash of the config files and the tokenizer beside the weights."""
        if folder not in self._tokenizers:
            files = sorted(p for p in folder.iterdir() if p.suffix in (".json", ".jinja", ".model", ".txt"))
            self._tokenizers[folder] = digest([[p.name, file_sha256(p)] for p in files if p.name != "card.json"])
        return self._tokenizers[folder]

    def contents(self, config: RunConfig, data_facts: Mapping[str, Any]) -> dict[str, str]:
        """Return the SHA-256 by name of all files that a config only names.

        Args:
            config: the config.
            data_facts: `Splits.facts` of its data.
        """
        folder = self.folder(config.model)
        contents = {"base": self.base_sha256(folder), "tokenizer": self.tokenizer_sha256(folder)}
        if config.model.chat_template is not None:
            contents["chat_template"] = file_sha256(Path(config.model.chat_template))
        splits = [split for split in ("train", "dev", "golden") if split in data_facts]
        return contents | {split: data_facts[split]["sha256"] for split in splits}


def _download(hub_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=list(_WANTED)))
    except Exception as error:  # the Hub's client raises many kinds: no such model, no network, no permission
        raise UnreachableError(
            f"model.path={hub_id}: not to be had from the Hub at revision {revision or 'main'} "
            f"({type(error).__name__}: {error}); check the name, or download it and give the folder"
        ) from error


def _weights_sha256(folder: Path) -> str:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UsageError(f"{folder}: no *.safetensors; pickled weights are not loaded, save it with save_pretrained")
    return digest([[path.name, file_sha256(path)] for path in files])


def problems(config: RunConfig) -> Iterator[str]:
    """Yield what is wrong with the section `model`: a missing or damaged checkpoint, revision or chat template."""
    model = config.model
    folder = Path(model.path)
    if model.path == EMBEDDED:
        if model.revision is not None:
            yield f"model.revision={model.revision}: the embedded base has no revisions; only a Hub id has"
    elif folder.is_dir():
        yield from (f"model.path={model.path}: {problem}" for problem in checkpoint_problems(folder))
        if model.revision is not None:
            yield f"model.revision={model.revision}: model.path={model.path} is a folder and has no revisions"
    elif folder.is_absolute() or model.path.startswith(".") or not _HUB_ID.fullmatch(model.path):
        yield f"model.path={model.path}: no such folder; allowed: a folder, a Hub id (owner/name) or `embedded`"
    if model.chat_template is not None:
        template = Path(model.chat_template)
        if not template.is_file():
            yield f"model.chat_template={model.chat_template}: no such file; give a Jinja chat template"
        elif not is_utf8(template):
            yield f"model.chat_template={model.chat_template}: not UTF-8 text; give a Jinja chat template"


def checkpoint_problems(folder: Path) -> Iterator[str]:
    """Yield what is missing or damaged in a checkpoint, as far as it shows without loading it."""
    if not (folder / "config.json").is_file():
        yield "the folder has no config.json; give a checkpoint saved by transformers"
        return
    config = _read_json_object(folder / "config.json")
    if config is None:
        yield "config.json is not readable as JSON; copy or download the checkpoint again"
    elif "model_type" not in config:
        yield "config.json names no model_type; give a checkpoint saved by transformers"
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        yield f"no tokenizer (one of {', '.join(_TOKENIZERS)}); save it there with save_pretrained, too"
    index = _read_json_object(folder / "model.safetensors.index.json") or {}
    parts = {path.name for path in folder.glob("*.safetensors")}
    lacking = sorted(set(map(str, index.get("weight_map", {}).values())) - parts)
    if lacking:
        yield f"model.safetensors.index.json names {', '.join(lacking[:3])}, not there; copy or download it again"
    elif not parts:
        yield "the folder has no *.safetensors (pickled weights are not loaded); save it again with save_pretrained"
    for name in sorted(parts):
        if not _is_whole_safetensors(folder / name):
            yield f"{name} is cut off, or no safetensors file; copy or download it again"


def is_utf8(path: Path) -> bool:
    """Return True where a file is text in UTF-8."""
    try:
        path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _read_json_object(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _is_whole_safetensors(path: Path) -> bool:
    """Compare the size of a safetensors file with its header: 8 bytes of length, the header, the tensors."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > path.stat().st_size:
            return False
        try:
            header = json.loads(file.read(size))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, AttributeError, KeyError, TypeError, IndexError):
            return False
    return path.stat().st_size == 8 + size + max(ends, default=0)
