"""The SFT checkpoint: its folder, ready to load; the hashes that identify it; and what is wrong with it.

What is given may be an adapter, or a multimodal model: the checkpoint that all models of a study load is then made of
it once, in the cache, by the function that `Checkpoints` gets. Nothing here loads weights.
"""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from harness.config.checkpoint_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    TOKENIZER_FILES,
    adapter_problems,
    checkpoint_problems,
    file_problem,
    has_chat_template,
    has_vocabulary,
    has_weights,
    header,
    in_full_precision,
    is_adapter,
    language_model_problems,
    multimodal_type,
    quantisation,
    read_json_object,
    template_of_processor,
    weight_files,
)
from harness.config.paths import embedded_dir
from harness.config.schema import EMBEDDED, ModelConfig, RunConfig
from harness.study.errors import UnreachableError, UsageError
from harness.study.files import digest, file_sha256, is_sealed, locked, seal, write_json
from harness.study.integrity import changed_files, fingerprint
from harness.study.log import say

DERIVED = "derived.json"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_WANTED = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.txt")
_NOT_WANTED = ("*/*",)  # checkpoints of the training, and other formats of the same weights
_MAX_CHAIN = 8  # of adapters on adapters
# Entries of an adapter's config that say where it was made, and not what it is.
_NO_CONTENT = ("base_model_name_or_path", "revision", "peft_version", "inference_mode", "auto_mapping")


@dataclass(frozen=True)
class Derivation:
    """A checkpoint that is to be made of others.

    Attributes:
        kind: `merged`, an adapter merged into its base; or `text`, the language model of a multimodal one.
        base: folder of the weights.
        adapter: folder of the adapter; it may be that of the weights. None for `text`.
        files: of the tokenizer, of generation: from which path each is copied, by name.
    """

    kind: str
    base: Path
    adapter: Path | None
    files: Mapping[str, Path]


class Checkpoints:
    """Folders and hashes of checkpoints: each is downloaded, made and hashed once per instance.

    Args:
        derive: writes the checkpoint of a derivation into a folder; None where none is to be made.
    """

    def __init__(self, derive: Callable[[Derivation, Path], None] | None = None) -> None:
        self._derive = derive
        self._folders: dict[tuple[str, str | None, str], Path] = {}
        self._weights: dict[Path, str] = {}
        self._tokenizers: dict[Path, str] = {}
        self._made: dict[Path, dict[str, str]] = {}

    def folder(self, model: ModelConfig, results_dir: str = "results") -> Path:
        """Return the folder that every model of a study loads.

        A Hub id is downloaded first (weights in safetensors, no code). An adapter is merged into its base, and of a
        multimodal model the language model is taken, once per `results_dir`.

        Args:
            model: the section `model` of a config.
            results_dir: in its cache derived checkpoints are kept.

        Raises:
            UnreachableError: for a Hub id that cannot be downloaded.
            UsageError: for a checkpoint that cannot be trained; an adapter whose base is missing, or another one.
        """
        if model.path == EMBEDDED:
            return embedded_dir()
        key = (model.path, model.revision, results_dir)
        if key not in self._folders:
            given = self.given_folder(model)
            try:
                if not Path(model.path).is_dir():
                    _refuse(folder_problems(given))
                self._folders[key] = self._usable(given, Path(results_dir) / ".cache")
            except UnreachableError as error:
                raise UnreachableError(f"model.path={model.path}: {error}") from error
            except UsageError as error:
                raise UsageError(f"model.path={model.path}: {error}") from error
        return self._folders[key]

    def given_folder(self, model: ModelConfig) -> Path:
        """Return the folder as it was given, or the downloaded one of a Hub id; nothing is merged.

        Raises:
            UnreachableError: for a Hub id that cannot be downloaded.
        """
        if model.path == EMBEDDED:
            return embedded_dir()
        folder = Path(model.path)
        if folder.is_dir():
            return folder.resolve()
        try:
            return _download(model.path, model.revision)
        except UnreachableError as error:
            raise UnreachableError(f"model.path={error}") from error

    def base_sha256(self, folder: Path) -> str:
        """Return the hash of the weights: of the bytes of all safetensors files; of a derived one, of its sources.

        Raises:
            UsageError: for a folder without safetensors files.
        """
        if folder not in self._weights:
            self._weights[folder] = _weights_sha256(folder)
        return self._weights[folder]

    def tokenizer_sha256(self, folder: Path) -> str:
        """Return the hash of the config files and the tokenizer beside the weights."""
        if folder not in self._tokenizers:
            self._tokenizers[folder] = _tokenizer_sha256(folder)
        return self._tokenizers[folder]

    def made_of(self, folder: Path) -> dict[str, str]:
        """Return what a derived checkpoint was made of: its kind, and folders and hashes of its sources."""
        return self._made.get(folder, {})

    def contents(self, config: RunConfig, data_facts: Mapping[str, Any]) -> dict[str, str]:
        """Return the SHA-256 by name of all files that a config only names.

        Args:
            config: the config.
            data_facts: `Splits.facts` of its data.
        """
        folder = self.folder(config.model, config.results_dir)
        contents = {"base": self.base_sha256(folder), "tokenizer": self.tokenizer_sha256(folder)}
        if config.model.chat_template is not None:
            contents["chat_template"] = file_sha256(Path(config.model.chat_template))
        splits = [split for split in ("train", "dev", "golden") if split in data_facts]
        return contents | {split: data_facts[split]["sha256"] for split in splits}

    def _usable(self, folder: Path, cache: Path, *, for_adapter: str = "", depth: int = 0) -> Path:
        """Return a folder with plain weights of a language model: the given one, or one that is made of it.

        Args:
            folder: of a checkpoint or an adapter.
            cache: where made ones are kept.
            for_adapter: `whole` where an adapter on the whole of a multimodal model is to be merged into it.
            depth: number of adapters above it.
        """
        if depth > _MAX_CHAIN:
            raise UsageError(f"{folder}: more than {_MAX_CHAIN} adapters on each other, or one that is its own base")
        if is_adapter(folder):
            base = self._base_of(folder, cache, depth)
            folder = self._derived("merged", base, folder, cache)
        if multimodal_type(folder) and for_adapter != "whole":
            folder = self._derived("text", folder, None, cache)
        return folder

    def _base_of(self, adapter: Path, cache: Path, depth: int) -> Path:
        """Return the folder of the weights that an adapter belongs to."""
        about = read_json_object(adapter / ADAPTER_CONFIG) or {}
        name, revision = about.get("base_model_name_or_path") or "", about.get("revision")
        if has_weights(adapter):
            self._refuse_other_base(adapter, name, revision)
            return adapter
        if not name:
            raise UsageError(
                f"{ADAPTER_CONFIG} names no base (base_model_name_or_path); write the base's folder or Hub id there"
            )
        folder = _local_base(adapter, name)
        if folder is None and not _HUB_ID.fullmatch(name):
            raise UsageError(
                f"its adapter was trained on {name} ({ADAPTER_CONFIG}: base_model_name_or_path), and there is no such "
                "folder; write the base's folder on this machine, or its Hub id, there"
            )
        if folder == adapter.resolve():
            raise UsageError(f"{ADAPTER_CONFIG} names its own folder as the base, which holds no weights; copy them")
        try:
            if folder is None:
                _refuse_quantised_base(name, revision)
                folder = _download(name, revision)
        except UnreachableError as error:
            raise UnreachableError(f"the base of its adapter, {error}") from error
        named = f"its adapter's base {name}"
        if is_adapter(folder):
            _refuse(folder_problems(folder), named)
        else:
            _refuse_merged_before(adapter)
            _refuse(checkpoint_problems(folder, needs_tokenizer=not has_vocabulary(adapter)), named)
            _refuse(
                language_model_problems(folder),
                named,
                f"; write its folder or Hub id into {ADAPTER_CONFIG} as the base",
            )
        whole = "whole" if multimodal_type(folder) and _touches_the_whole(adapter) else ""
        return self._usable(folder, cache, for_adapter=whole, depth=depth + 1)

    def _refuse_other_base(self, folder: Path, name: str, revision: str | None) -> None:
        """Refuse an adapter beside weights that it was not trained on, as far as can be told."""
        base = _local_base(folder, name) if name else None
        if base is None and _HUB_ID.fullmatch(name):
            base = _downloaded_before(name, revision)
        if base is not None and (base == folder.resolve() or _same_weights(base, folder)):
            return
        why = "whose weights are others" if base is not None else "which is not here to compare"
        raise UsageError(
            f"the folder holds weights and an adapter, and the adapter belongs to {name or 'no base that it names'}"
            f"{f', {why}' if name else ''} ({ADAPTER_CONFIG}: base_model_name_or_path): loaders disagree on which of "
            f"both they load. To train from the weights alone, move {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS} away; to "
            "train from the adapter on its base, give a folder with the adapter alone; where it does belong to these "
            "weights, write base_model_name_or_path: ."
        )

    def _derived(self, kind: str, base: Path, adapter: Path | None, cache: Path) -> Path:
        """Return the folder of a derived checkpoint; it is made where it is not in the cache, or not whole."""
        derivation = Derivation(kind, base, adapter, _taken_files(base, adapter))
        facts = {
            "kind": kind,
            "base_sha256": digest([kind, self.base_sha256(base), _adapter_sha256(adapter) if adapter else ""]),
            "tokenizer_sha256": digest(
                [file_sha256(base / "config.json"), {name: file_sha256(p) for name, p in derivation.files.items()}]
            ),
        }
        place = (cache / kind).resolve()
        target = place / digest(facts)[:16]
        try:
            with locked(place):  # the first process makes it, the others wait
                if not _is_whole(target):
                    self._make(derivation, facts, target)
        except OSError as error:
            raise UsageError(f"{place} cannot be written ({error.strerror}); give another results_dir") from error
        # Its identity is that of its sources: what it is made with, and when, changes nothing.
        self._weights[target], self._tokenizers[target] = facts["base_sha256"], facts["tokenizer_sha256"]
        sources = {"kind": kind, "base": str(base), "base_sha256": self.base_sha256(base)}
        if adapter:
            sources |= {"adapter": str(adapter), "adapter_sha256": file_sha256(adapter / ADAPTER_WEIGHTS)}
        self._made[target] = sources
        return target

    def _make(self, derivation: Derivation, facts: Mapping[str, str], target: Path) -> None:
        """Make a checkpoint under a temporary name and rename it: a folder that exists was written whole."""
        if self._derive is None:
            raise UsageError(f"{target} is not there; run harness.sweep or harness.train, which make it")
        what = (
            f"merging the adapter {derivation.adapter} into" if derivation.adapter else "taking the language model of"
        )
        say(f"{what} {derivation.base}, once: {target}")
        temporary = target.with_name(f".{target.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(target, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            self._derive(derivation, temporary)
            for name, path in derivation.files.items():
                shutil.copyfile(path, temporary / name)
            template = template_of_processor(temporary)
            if template is not None and not has_chat_template(temporary):
                (temporary / "chat_template.jinja").write_text(template, encoding="utf-8")
            _write_facts(temporary, facts)
            temporary.rename(target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _refuse_quantised_base(hub_id: str, revision: str | None) -> None:
    """Refuse an adapter whose base on the Hub is quantised, before its weights are downloaded."""
    full = in_full_precision(hub_id)
    if not full:
        config = read_json_object(_download(hub_id, revision, ("config.json",)) / "config.json") or {}
        if not quantisation(config):
            return
    raise UsageError(
        f"its adapter was trained on {hub_id}, a quantised copy of a model; write the model in full precision into "
        f"{ADAPTER_CONFIG} as base_model_name_or_path, by its Hub id{f' ({full})' if full else ''} or its folder: the "
        "adapter is merged into that one"
    )


def _refuse_merged_before(adapter: Path) -> None:
    """Refuse an adapter that was trained after others were merged into its base, as far as the folder says so."""
    path = adapter / "training_args.yaml"  # LLaMA-Factory's web interface writes it; adapter_config.json has no word
    if not path.is_file():
        return
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return
    given = found.get("adapter_name_or_path") if isinstance(found, dict) else None
    names = [name.strip() for name in (given.split(",") if isinstance(given, str) else given or []) if name]
    merged = names if names and found.get("create_new_adapter") else names[:-1]
    if merged:
        raise UsageError(
            f"it was trained after the adapter {', '.join(merged)} had been merged into the base ({path.name}: "
            f"adapter_name_or_path); write that adapter's folder into {ADAPTER_CONFIG} as base_model_name_or_path: "
            "adapters on adapters are merged in turn"
        )


def _download(hub_id: str, revision: str | None, wanted: tuple[str, ...] = _WANTED) -> Path:
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            hub_id, revision=revision, allow_patterns=list(wanted), ignore_patterns=list(_NOT_WANTED)
        )
        return Path(found)
    except Exception as error:  # the Hub's client raises many kinds: no such model, no network, no permission
        raise UnreachableError(
            f"{hub_id}: not to be had from the Hub at revision {revision or 'main'} "
            f"({type(error).__name__}: {error}); check the name, or download it and give the folder"
        ) from error


def _downloaded_before(hub_id: str, revision: str | None) -> Path | None:
    """Return the folder of a Hub id in the local cache, or None; a base is not fetched only to be compared."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, revision=revision, local_files_only=True))
    except Exception:  # not there, in one of many words
        return None


def _local_base(adapter: Path, name: str) -> Path | None:
    """Return the folder that an adapter names as its base: as written, from its own folder, or from this one."""
    if name == EMBEDDED:
        return embedded_dir()
    path = Path(name).expanduser()
    found = [place for place in (adapter / path, Path.cwd() / path) if place.is_dir()]
    return found[0].resolve() if found else None


def _same_weights(first: Path, second: Path) -> bool:
    """Return whether two folders hold the same weight files, byte for byte."""
    files = weight_files(first), weight_files(second)
    sizes = [[path.stat().st_size for path in found] for found in files]
    return bool(files[0]) and sizes[0] == sizes[1] and _hashes(files[0]) == _hashes(files[1])


def _hashes(paths: list[Path]) -> list[str]:
    return [file_sha256(path) for path in paths]


def _touches_the_whole(adapter: Path) -> bool:
    """Return whether an adapter was trained on a whole multimodal model, and not on its language model alone."""
    names = header(adapter / ADAPTER_WEIGHTS) or {}
    return any(part in name for name in names for part in ("language_model", "vision", "visual", "audio", "projector"))


def _taken_files(base: Path, adapter: Path | None) -> dict[str, Path]:
    """Return the files that a derived checkpoint takes over, by name.

    The tokenizer is the adapter's where it has a whole one: SFT may have added tokens or a template. Else it is the
    base's, with what the adapter's folder has of it on top, such as a chat template.
    """
    folders = [base, adapter] if adapter and adapter != base else [base]
    if adapter and has_vocabulary(adapter):
        folders = [adapter]
    found = {name: folder / name for folder in folders for name in TOKENIZER_FILES if (folder / name).is_file()}
    for folder in [base, *([adapter] if adapter else [])]:
        if (folder / "generation_config.json").is_file():
            found["generation_config.json"] = folder / "generation_config.json"
    return dict(sorted(found.items()))


def _adapter_sha256(folder: Path) -> str:
    about = read_json_object(folder / ADAPTER_CONFIG) or {}
    content = {key: value for key, value in about.items() if key not in _NO_CONTENT and value}  # unset ones come and go
    if isinstance(content.get("target_modules"), list):
        content["target_modules"] = sorted(map(str, content["target_modules"]))  # a set, written in any order
    return digest([content, file_sha256(folder / ADAPTER_WEIGHTS)])


def _write_facts(folder: Path, facts: Mapping[str, str]) -> None:
    """Write what a derived checkpoint was made of and what its files are, once they are on the disk."""
    files = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        files[path.name] = fingerprint(path)
    write_json(folder / DERIVED, seal({**facts, "files": files}))


def _is_whole(folder: Path) -> bool:
    """Return whether a derived checkpoint is as it was made."""
    found = read_json_object(folder / DERIVED) or {}
    return bool(found) and is_sealed(found) and not changed_files(folder, found["files"], read_bytes=math.inf)


def _weights_sha256(folder: Path) -> str:
    files = weight_files(folder)
    if not files:
        raise UsageError(f"{folder}: no *.safetensors; pickled weights are not loaded, save it with save_pretrained")
    return digest([[path.name, file_sha256(path)] for path in files])


def _tokenizer_sha256(folder: Path) -> str:
    files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".jinja", ".model", ".txt"))
    return digest([[path.name, file_sha256(path)] for path in files if path.name != "card.json"])


def _refuse(problems: Iterator[str], named: str = "", remedy: str = "") -> None:
    found = [f"{named}: {problem}{remedy}" if named else problem for problem in problems]
    if found:
        raise UsageError("\n".join(found))


def problems(config: RunConfig) -> Iterator[str]:
    """Yield what is wrong with the section `model`: a missing or damaged checkpoint, revision or chat template."""
    model = config.model
    folder = Path(model.path)
    if model.path == EMBEDDED:
        if model.revision is not None:
            yield f"model.revision={model.revision}: the embedded base has no revisions; only a Hub id has"
    elif folder.is_dir():
        yield from (f"model.path={model.path}: {problem}" for problem in folder_problems(folder))
        if model.revision is not None:
            yield f"model.revision={model.revision}: model.path={model.path} is a folder and has no revisions"
    elif folder.is_file():
        yield f"model.path={model.path}: {file_problem(folder)}"
    elif folder.is_absolute() or model.path.startswith(".") or not _HUB_ID.fullmatch(model.path):
        yield f"model.path={model.path}: no such folder; allowed: a folder, a Hub id (owner/name) or `embedded`"
    if model.chat_template is not None:
        template = Path(model.chat_template)
        if not template.is_file():
            yield f"model.chat_template={model.chat_template}: no such file; give a Jinja chat template"
        elif not is_utf8(template):
            yield f"model.chat_template={model.chat_template}: not UTF-8 text; give a Jinja chat template"


def folder_problems(folder: Path) -> Iterator[str]:
    """Yield what keeps a folder from being trained: damaged files, another kind of model, weights in another form."""
    if is_adapter(folder):
        yield from adapter_problems(folder)
    if not is_adapter(folder) or has_weights(folder):
        yield from checkpoint_problems(folder)
        yield from language_model_problems(folder)


def is_derived(folder: Path) -> bool:
    """Return whether a folder is a checkpoint that was made here of others."""
    return (folder / DERIVED).is_file()


def is_utf8(path: Path) -> bool:
    """Return True where a file is text in UTF-8."""
    try:
        path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return False
    return True
