"""What a checkpoint's folder holds, and what is wrong with it: from names, JSON and safetensors headers alone."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

# What a tokenizer is read from; one of `_VOCABULARIES` must be there.
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
TOKENIZER_FILES = (
    *_VOCABULARIES,
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt"),
    *("chat_template.jinja", "chat_template.json"),
)
_FLOATS = {"F64", "F32", "F16", "BF16"}
# Adapters that work beside the weights and not in them: no merge can write them into a model.
_UNMERGEABLE = {
    *("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT", "CARTRIDGE"),
    *("XLORA", "POLY", "SHADOW"),
}
# Initialisations after which PEFT cannot give an adapter the base that it was trained on: the base's weights were
# changed by something that the folder does not hold (gradients, random numbers, another library's quantiser).
_CHANGES_THE_BASE = re.compile(r"pissa_niter_.*|loftq|corda.*|lora_ga", re.IGNORECASE)
_PARTS_OF_PISSA = ("pissa_init", "pissa_backup")
_FOUR_BITS = re.compile(r"(-unsloth)?-bnb-4bit$", re.IGNORECASE)  # how the names of models in 4 bits end
_NO_LANGUAGE_MODEL = (
    *("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice"),
    *("ForMaskedLM", "ForPreTraining", "RewardModel", "ForRewardModel", "ForScore", "ForNextSentencePrediction"),
)


def is_adapter(folder: Path) -> bool:
    """Return whether PEFT's adapter lies in a folder, alone or beside weights."""
    return (folder / ADAPTER_CONFIG).is_file()


def has_weights(folder: Path) -> bool:
    """Return whether a folder holds weights of a whole model in safetensors."""
    return (folder / "config.json").is_file() and any((folder / name).is_file() for name in (SINGLE, INDEX))


def weight_files(folder: Path) -> list[Path]:
    """Return a folder's safetensors files without those of an adapter, by name."""
    return sorted(path for path in folder.glob("*.safetensors") if path.name != ADAPTER_WEIGHTS)


def multimodal_type(folder: Path) -> str:
    """Return the model type of a checkpoint whose language model is one part among others; empty for all others."""
    config = read_json_object(folder / "config.json") or {}
    return str(config.get("model_type")) if isinstance(config.get("text_config"), dict) else ""


def has_chat_template(folder: Path) -> bool:
    """Return whether a checkpoint's tokenizer has a chat template; of chat_template.json it takes none."""
    about = read_json_object(folder / "tokenizer_config.json") or {}
    return bool(about.get("chat_template")) or (folder / "chat_template.jinja").is_file()


def template_of_processor(folder: Path) -> str | None:
    """Return the chat template in chat_template.json, which processors wrote and no tokenizer reads."""
    found = (read_json_object(folder / "chat_template.json") or {}).get("chat_template")
    return found if isinstance(found, str) else None


def checkpoint_problems(folder: Path, *, needs_tokenizer: bool = True) -> Iterator[str]:
    """Yield what is missing or damaged in a checkpoint of any kind, as far as it shows without loading it."""
    if not (folder / "config.json").is_file():
        yield _without_config(folder)
        return
    config = read_json_object(folder / "config.json")
    if config is None:
        yield "config.json is not readable as JSON; copy or download the checkpoint again"
    elif "model_type" not in config:
        yield "config.json names no model_type; give a checkpoint saved by transformers"
    if needs_tokenizer and not has_vocabulary(folder):
        yield f"no tokenizer (one of {', '.join(_VOCABULARIES)}); save it there with save_pretrained, too"
    yield from _weight_problems(folder)


def language_model_problems(folder: Path) -> Iterator[str]:
    """Yield what keeps a checkpoint with a readable config.json from being trained as a causal language model."""
    config = read_json_object(folder / "config.json") or {}
    architectures = [str(name) for name in config.get("architectures") or []]
    others = [name for name in architectures if name.endswith(_NO_LANGUAGE_MODEL)]
    if others and len(others) == len(architectures):
        yield (
            f"config.json says architectures={others[0]}, which is no language model: it writes no text; "
            "give a checkpoint of a causal language model (...ForCausalLM)"
        )
    if config.get("is_encoder_decoder"):
        yield (
            f"{config.get('model_type')} is an encoder-decoder model; allowed: decoders alone (...ForCausalLM), "
            "since TRL's DPO and SimPO share one sequence of prompt and answer"
        )
    if method := quantisation(config):
        yield (
            f"its weights are quantised (config.json: quantization_config, {method}); give the same checkpoint in "
            "bf16, fp16 or fp32 (train.tuning=qlora makes 4 bits of it by itself)"
        )
    for path in weight_files(folder) if not quantisation(config) else ():
        if name := next(iter(_quantised_tensors(path)), ""):
            yield f"{path.name}: tensor {name} is no bf16, fp16, fp32 or fp64; give the checkpoint in one of these"
            break


def quantisation(config: dict[str, Any]) -> str:
    """Return the method with which a config.json says that its weights are quantised; empty where they are not."""
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    for part in parts:
        found = part.get("quantization_config") or part.get("compression_config")
        if isinstance(found, dict) and found:
            bits = [key for key in ("load_in_4bit", "load_in_8bit") if found.get(key)]
            return " ".join(map(str, [found.get("quant_method", "of an unknown method"), *bits]))
    return ""


def in_full_precision(name: str) -> str:
    """Return the name in full precision of a model whose name says that it is in 4 bits; empty for all others."""
    found = _FOUR_BITS.search(name)
    return name[: found.start()] if found else ""


def adapter_problems(folder: Path) -> Iterator[str]:
    """Yield what keeps the adapter in a folder from being merged into its base."""
    about = read_json_object(folder / ADAPTER_CONFIG)
    if about is None:
        yield f"{ADAPTER_CONFIG} is not readable as JSON; copy or download the adapter again"
        return
    kind, task = str(about.get("peft_type")).upper(), about.get("task_type")
    if kind in _UNMERGEABLE:
        yield (
            f"its adapter ({ADAPTER_CONFIG}: peft_type={kind}) cannot be merged into a model's weights; give an SFT "
            "checkpoint trained with LoRA (or another adapter that merges) or with all weights"
        )
    if about.get("alora_invocation_tokens"):
        yield f"its adapter ({ADAPTER_CONFIG}: alora_invocation_tokens) acts on a part of a text and cannot be merged"
    if task not in (None, "CAUSAL_LM"):
        yield (
            f"its adapter ({ADAPTER_CONFIG}: task_type={task}) is not of a language model; allowed: CAUSAL_LM. "
            "A reward model's adapter is not what DPO or SimPO start from"
        )
    if why := _changed_base(folder, about):
        converted = folder.parent / "pissa_converted" if folder.name in _PARTS_OF_PISSA else folder / "pissa_converted"
        remedy = (
            f"give {converted}"
            if is_adapter(converted)
            else "save it as an adapter of the unchanged base (PEFT: save_pretrained with "
            "path_initial_model_for_weight_conversion; LLaMA-Factory: pissa_convert: true), or give the merged model"
        )
        yield (
            f"its adapter ({why}) belongs to a base whose weights were changed before training, and these are not in "
            f"the folder; {remedy}"
        )
    yield from _adapter_weight_problems(folder)


def _changed_base(folder: Path, about: dict[str, Any]) -> str:
    """Say what tells that an adapter belongs to other weights than those of the base that it names; else nothing."""
    start = about.get("init_lora_weights")
    if isinstance(start, str) and _CHANGES_THE_BASE.fullmatch(start):
        return f"{ADAPTER_CONFIG}: init_lora_weights={start}"
    # LLaMA-Factory keeps these two beside the adapter, and says in them that the base is unchanged; where it wrote the
    # changed base as well, that is the folder above.
    base = str(about.get("base_model_name_or_path"))
    if folder.name in _PARTS_OF_PISSA and Path(base).expanduser().resolve() != folder.parent.resolve():
        return f"{folder.name}, a part of PiSSA"
    return ""


def _adapter_weight_problems(folder: Path) -> Iterator[str]:
    path = folder / ADAPTER_WEIGHTS
    if path.is_file():
        if header(path) is None:
            yield f"{path.name} is cut off, or no safetensors file; copy or download it again"
    elif sharded := _unmerged_shards(folder, adapter=True):
        yield sharded
    elif parts := sorted(folder.glob("adapter_model-*-of-*.safetensors")):
        yield (
            f"its adapter is in parts ({parts[0].name}, ...), which PEFT does not read; in that folder run "
            'python -c "from glob import glob; from safetensors.torch import load_file, save_file; save_file({name: x '
            "for part in glob('adapter_model-*-of-*.safetensors') for name, x in load_file(part).items()}, "
            f"'{ADAPTER_WEIGHTS}')\""
        )
    elif (folder / "adapter_model.bin").is_file():
        yield (
            "its adapter is pickled (adapter_model.bin), which is not loaded; in that folder run "
            'python -c "import torch; from safetensors.torch import save_file; save_file(torch.load('
            "'adapter_model.bin', weights_only=True), 'adapter_model.safetensors')\""
        )
    elif inner := inner_checkpoints(folder):
        yield (
            f"{ADAPTER_CONFIG} is there and {ADAPTER_WEIGHTS} is not, as where training has not ended; the folder "
            f"holds checkpoints of it: give one, such as {inner[-1]}"
        )
    else:
        yield f"{ADAPTER_CONFIG} is there and {ADAPTER_WEIGHTS} is not; copy or download the adapter again"


def inner_checkpoints(folder: Path) -> list[Path]:
    """Return the folders in a folder that hold weights or an adapter, the newest step last."""
    return sorted(
        (path for path in folder.glob("*/") if has_weights(path) or (path / ADAPTER_WEIGHTS).is_file()),
        key=lambda path: (len(path.name), path.name),
    )


def has_vocabulary(folder: Path) -> bool:
    """Return whether a folder holds a tokenizer."""
    return any((folder / name).is_file() for name in _VOCABULARIES)


def file_problem(path: Path) -> str:
    """Say what to give in the place of a single file."""
    if path.suffix == ".gguf":
        return _gguf(path)
    return f"a file; give the folder of a checkpoint, with config.json and {SINGLE} (save_pretrained writes both)"


def header(path: Path) -> dict[str, Any] | None:
    """Return a safetensors file's entries by tensor name (`dtype`, `shape`); None where it is cut off or no such file.

    The file's size is compared with its header: 8 bytes of length, the header, the tensors.
    """
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > path.stat().st_size:
                return None
            found = json.loads(file.read(size))
        entries = {name: entry for name, entry in found.items() if name != "__metadata__"}
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        is_whole = path.stat().st_size == 8 + size + end and all("shape" in entry for entry in entries.values())
    except (OSError, ValueError, AttributeError, KeyError, TypeError, IndexError):
        return None
    return entries if is_whole else None


def read_json_object(path: Path) -> dict[str, Any] | None:
    """Return the mapping in a JSON file; None where it cannot be read, or is something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _without_config(folder: Path) -> str:
    """Say what a folder without config.json holds, and what to give."""
    if found := sorted(folder.glob("*.gguf")):
        return _gguf(found[0])
    if sharded := _unmerged_shards(folder):
        return sharded
    if inner := inner_checkpoints(folder):
        names = ", ".join(path.name for path in inner[-3:])
        return f"the folder holds checkpoints ({names}) and is none itself; give one, such as {inner[-1]}"
    if (folder / ADAPTER_WEIGHTS).is_file():
        return f"{ADAPTER_WEIGHTS} without {ADAPTER_CONFIG}, which names its base; copy it there, too"
    return "the folder has no config.json; give a checkpoint saved by transformers"


def _weight_problems(folder: Path) -> Iterator[str]:
    files = weight_files(folder)
    names = {path.name for path in files}
    index = read_json_object(folder / INDEX)
    if index is None and (folder / INDEX).is_file():
        yield f"{INDEX} is not readable as JSON; copy or download it again"
    shards = set(map(str, (index or {}).get("weight_map", {}).values()))
    if lacking := sorted(shards - names):
        yield f"{INDEX} names {', '.join(lacking[:3])}, not there; copy or download it again"
    elif not names:
        yield _without_safetensors(folder)
    elif shards and SINGLE in names - shards:
        yield f"it holds two sets of weights, {SINGLE} and the files that {INDEX} names; take one set away"
    elif not shards and SINGLE not in names:
        yield (
            f"it holds {', '.join(sorted(names)[:3])} and neither {SINGLE} nor {INDEX}, which say what is loaded; "
            "copy or download it again, or save it again with save_pretrained"
        )
    for path in files:
        if header(path) is None:
            yield f"{path.name} is cut off, or no safetensors file; copy or download it again"


def _without_safetensors(folder: Path) -> str:
    if sharded := _unmerged_shards(folder):
        return sharded
    pickled = [p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in sorted(folder.glob(pattern))]
    pickled = [name for name in pickled if name not in ("training_args.bin", "optimizer.pt", "scheduler.pt")]
    if found := sorted(folder.glob("*.gguf")):
        return _gguf(found[0])
    if not pickled and (inner := inner_checkpoints(folder)):
        return (
            "the folder has no *.safetensors, as where training has not ended; it holds checkpoints: give one, such "
            f"as {inner[-1]}"
        )
    if any(name.startswith("pytorch_model") for name in pickled):
        return (
            f"its weights are pickled ({pickled[0]}); pickled weights are not loaded, since they can run code. Where "
            f"you trust it, run {_save_again(folder)} and give NEW"
        )
    if pickled:
        return (
            f"the folder has no *.safetensors; {pickled[0]} is pickled, and not as transformers saves a model: "
            "convert it with the tool that wrote it, save it with save_pretrained and give that folder"
        )
    return "the folder has no *.safetensors (pickled weights are not loaded); save it again with save_pretrained"


def _unmerged_shards(folder: Path, *, adapter: bool = False) -> str:
    """Say how to gather what several processes saved in parts; empty where a folder holds no such parts."""
    what = "its adapter is" if adapter else "its weights are"
    then = f"rename NEW/{SINGLE} to {ADAPTER_WEIGHTS}, copy {ADAPTER_CONFIG}" if adapter else "copy config.json"
    if (folder / "zero_to_fp32.py").is_file() or any(folder.glob("global_step*/")):
        return (
            f"{what} DeepSpeed's parts of several processes; in that folder run python zero_to_fp32.py . NEW "
            f"--safe_serialization, {then} and the tokenizer there and give NEW"
        )
    parts = [path.parent for path in [*folder.glob("*.distcp"), *folder.glob("*/*.distcp")]]
    if parts:
        return (
            f"{what} FSDP's parts of several processes; run accelerate merge-weights {parts[0]} NEW, {then} and the "
            "tokenizer there and give NEW"
        )
    return ""


def _gguf(path: Path) -> str:
    return (
        f"{path.name} is GGUF, made for llama.cpp and mostly quantised; give the safetensors that it was made from, or "
        f"run pip install gguf and {_save_again(path.parent, gguf_file=path.name)}, and give NEW"
    )


def _save_again(folder: Path, **more: str) -> str:
    """Return the command that loads a folder in another format and saves it as safetensors."""
    names = (read_json_object(folder / "config.json") or {}).get("architectures") or []
    kind = "SequenceClassification" if any("SequenceClassification" in str(name) for name in names) else "CausalLM"
    given = ", ".join([f"'{folder}'", *(f"{key}='{value}'" for key, value in more.items())])
    # A model that was read from GGUF holds plain weights, and yet says of itself that it cannot be saved.
    plain = "m.hf_quantizer = None; del m.config.quantization_config; " if "gguf_file" in more else ""
    return (
        f'python -c "from transformers import AutoModelFor{kind} as M, AutoTokenizer as T; '
        f"m = M.from_pretrained({given}); {plain}m.save_pretrained('NEW'); "
        f"T.from_pretrained({given}).save_pretrained('NEW')\""
    )


def _quantised_tensors(path: Path) -> Iterator[str]:
    """Yield the weights of a file that are no floating-point numbers of at least 16 bits."""
    for name, entry in (header(path) or {}).items():
        if name.endswith("weight") and entry.get("dtype") not in _FLOATS:
            yield name
