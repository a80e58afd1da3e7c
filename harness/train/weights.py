"""Precondition 1: every parameter of a model came from its checkpoint's files, as a finite number.

transformers draws a tensor at random that it does not find, and says so in a table that nobody reads. Here it is
refused by name: from the files' names and shapes on the meta device before a study starts, and again at each load.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.config.checkpoint_files import header, weight_files
from harness.study.errors import UsageError, is_out_of_memory
from harness.study.files import digest, read_sealed, seal, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SHOWN = 3
_WARNED = 12
# What PEFT calls the tensors of its adapters: weights that hold them are not what the model is.
_OF_ADAPTERS = re.compile(r"(^|\.)(lora_|modules_to_save\.|ia3_|hada_|lokr_|oft_|vera_|base_layer\.|original_module\.)")
_LAYER = re.compile(r"(?<=\.)\d+(?=\.)")


def load_checked(cls: Any, folder: Path, *, named: str = "", **options: Any) -> PreTrainedModel:
    """Load a model with all of its parameters.

    Args:
        cls: a class of transformers with `from_pretrained`, such as `AutoModelForCausalLM`.
        folder: of the checkpoint.
        named: what a message calls the folder; empty for its path.
        options: of `from_pretrained`.

    Raises:
        UsageError: where a parameter is missing or of another shape, or where the class cannot read the checkpoint.
    """
    from transformers.utils.logging import disable_progress_bar, get_verbosity, set_verbosity, set_verbosity_error

    disable_progress_bar()  # a bar per load, a hundred times, tells nothing
    safe = {"trust_remote_code": False, "use_safetensors": True, "ignore_mismatched_sizes": True}
    verbosity = get_verbosity()
    set_verbosity_error()  # what its table of missing tensors says is raised below
    try:
        model, found = cls.from_pretrained(folder, output_loading_info=True, **safe, **options)
    except Exception as error:  # of checkpoints that nobody has tried with this version of transformers
        if getattr(error, "errno", None) or is_out_of_memory(error):  # of the disk, of the machine
            raise
        raise UsageError(f"{named or folder}: {_why_unreadable(folder, error)}") from error
    finally:
        set_verbosity(verbosity)
    problems = [*_missing(found), *_misplaced(found, model)]
    if problems:
        raise UsageError("\n".join(f"{named or folder}: {problem}" for problem in problems))
    model.unexpected_tensors = sorted(found["unexpected_keys"])
    return model


def check_weights(folder: Path, *, named: str, about: Sequence[str], cache: Path) -> list[str]:
    """Refuse a checkpoint with missing tensors, or with numbers that are none; nothing is held in memory.

    The result is kept in the cache: the same files, read by the same version of transformers, cost nothing twice.

    Args:
        folder: of a checkpoint that the study loads.
        named: what a message calls it.
        about: hashes of its files.
        cache: folder of results.

    Returns:
        One warning where the files hold tensors that the model has no place for.

    Raises:
        UsageError: names the tensors.
    """
    import transformers

    path = cache / "weights" / f"{digest([*about, transformers.__version__])[:16]}.json"
    if (known := read_sealed(path)) is not None:
        return list(known["unexpected"] and [_unexpected(known["unexpected"], named)])
    unexpected = _check(folder, named)
    write_json(path, seal({"unexpected": unexpected}))
    return [_unexpected(unexpected, named)] if unexpected else []


def _check(folder: Path, named: str) -> list[str]:
    """Return the names of unexpected tensors."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    for read, what in ((AutoConfig, "config.json"), (AutoTokenizer, "the tokenizer")):
        try:
            config = read.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # damaged files raise whatever their reader stumbles over
            raise UsageError(f"{named}: {what} cannot be read: {_why_unreadable(folder, error)}") from error
        if read is AutoConfig and getattr(config, "is_encoder_decoder", False):
            raise UsageError(f"{named}: {config.model_type} is an encoder-decoder model; allowed: decoders alone")
    model = load_checked(AutoModelForCausalLM, folder, named=named, device_map={"": "meta"}, dtype="auto")
    if two := next(_two_of_one(model, weight_files(folder)), ""):
        raise UsageError(f"{named}: {two}")
    if bad := next(_not_finite(weight_files(folder)), ""):
        raise UsageError(f"{named}: {bad}; its training has diverged, or the file is damaged: give another checkpoint")
    return list(model.unexpected_tensors)


def _two_of_one(model: PreTrainedModel, files: Sequence[Path]) -> Iterator[str]:
    """Yield pairs of tensors that config.json ties and the files do not: loaders differ in which one they take."""
    from safetensors import safe_open

    places = {name: path for path in files for name in header(path) or {}}
    for target, source in model.all_tied_weights_keys.items():
        if target in places and source in places:
            with safe_open(places[target], framework="pt") as one, safe_open(places[source], framework="pt") as other:
                if not one.get_tensor(target).equal(other.get_tensor(source)):
                    yield (
                        f"config.json ties {target} to {source}, and the files hold two different tensors; where two "
                        "are meant, say tie_word_embeddings: false in config.json, else take one away"
                    )


def _not_finite(files: Iterable[Path]) -> Iterator[str]:
    """Yield the tensors of files that hold NaN or infinity, one tensor in memory at a time."""
    import torch
    from safetensors import safe_open

    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - a file of safetensors is no mapping
                tensor = file.get_tensor(name)
                if tensor.is_floating_point() and tensor.element_size() > 1:
                    bad = tensor.numel() - int(torch.isfinite(tensor).sum())
                    if bad:
                        yield f"{path.name}: {bad} of {tensor.numel()} numbers of {name} are NaN or infinite"


def _missing(found: Mapping[str, Any]) -> Iterator[str]:
    """Say which parameters the files do not give."""
    missing, unexpected = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    if missing:
        text = f"{_named(missing, 'parameter')} of the model {_are(missing)} not in its files, and would be random"
        if unexpected:
            text += f"; the files have {_named(unexpected, 'tensor')} instead{_renaming(missing, unexpected)}"
        elif all(name.endswith("lm_head.weight") for name in missing):
            text += "; where the model ties them to its embeddings, say tie_word_embeddings: true in config.json"
        yield f"{text}; save the whole model again with save_pretrained"
    if wrong := sorted(found["mismatched_keys"]):
        shapes = "; ".join(f"{name} is {_shape(here)}, not {_shape(there)}" for name, here, there in wrong[:_SHOWN])
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        yield (
            f"tensors have another shape than config.json says ({shapes}{more}), and would be random; give config.json "
            "and weights of one checkpoint (a vocabulary that has grown needs vocab_size in config.json)"
        )
    if errors := found.get("error_msgs"):
        yield f"it cannot be loaded: {str(errors[0]).splitlines()[0]}"


def _misplaced(found: Mapping[str, Any], model: PreTrainedModel) -> Iterator[str]:
    """Say which tensors beside the model's are a part of what it computes: without them it is another model."""
    unexpected = sorted(found["unexpected_keys"])
    if found["missing_keys"]:
        return
    if adapter := [name for name in unexpected if _OF_ADAPTERS.search(name)]:
        yield (
            f"{_named(adapter, 'tensor')} {_are(adapter)} of an adapter that would be left out; merge it "
            "(merge_and_unload), save the model and give that folder, or give the adapter's own folder"
        )
        return
    own = set(model.state_dict())
    patterns = {_LAYER.sub("N", name) for name in own}
    layers = [name for name in unexpected if _LAYER.sub("N", name) in patterns]
    if layers:
        yield (
            f"{_named(layers, 'tensor')} {_are(layers)} of layers that config.json does not have, and would be left "
            "out; give config.json and weights of one checkpoint (num_hidden_layers)"
        )
    parts = {name.rpartition(".")[0] for name in own}
    biases = [name for name in unexpected if name.endswith(".bias") and name.removesuffix(".bias") in parts]
    if biases:
        yield (
            f"{_named(biases, 'tensor')} {_are(biases)} of layers that have no bias by config.json, and would be left "
            "out; give config.json and weights of one checkpoint"
        )


def _renaming(missing: Sequence[str], unexpected: Sequence[str]) -> str:
    """Say which prefix makes the names in the files those of the model; empty where none does."""
    wanted = set(missing)
    for name in unexpected:
        for start in range(len(name)):
            if name[start:] in wanted:
                prefix = name[:start]
                renamed = {other.removeprefix(prefix) for other in unexpected}
                # A tied head is wanted, too, where the embeddings have not been found.
                if prefix and (wanted <= renamed or renamed <= wanted):
                    return f" (the same with `{prefix}` in front: unwrap the model before it is saved)"
                break
    for name in missing:
        for start in range(len(name)):
            if name[start:] in unexpected and start:
                return f" (the same without `{name[:start]}` in front)"
    return ""


def _unexpected(names: Sequence[str], named: str) -> str:
    more = f" and {len(names) - _WARNED} more" if len(names) > _WARNED else ""
    what = "1 tensor that is" if len(names) == 1 else f"{len(names)} tensors that are"
    return (
        f"{named}: its files hold {what} no part of the language model and left out: {', '.join(names[:_WARNED])}{more}"
    )


def _why_unreadable(folder: Path, error: Exception) -> str:
    """Return one sentence on why a checkpoint cannot be read."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if "trust_remote_code" in str(error) or "auto_map" in str(error):
        return (
            "it needs Python code of its own (auto_map in config.json), which is never run; give a checkpoint of an "
            "architecture that transformers has"
        )
    if "Unrecognized" in first or "does not recognize" in first:
        from transformers import __version__

        return (
            f"transformers {__version__} has no causal language model of this type ({first[:200]}); "
            "give a checkpoint of an architecture that it has"
        )
    return f"it cannot be loaded ({type(error).__name__}: {first[:300]})"


def _named(names: Sequence[str], what: str) -> str:
    """Return a count of tensors with the names of the first."""
    shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
    return f"{len(names)} {what}{'s' * (len(names) > 1)} ({shown})"


def _are(names: Sequence[str]) -> str:
    return "are" if len(names) > 1 else "is"


def _shape(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape)) or "a single number"
