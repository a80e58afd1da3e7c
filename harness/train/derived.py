"""Make the checkpoint that all models of a study load: an adapter in its base, or the text part alone.

What is made is loaded again and must compute what it was made of: a merge that a file cannot hold is refused.
"""

from __future__ import annotations

import gc
import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.config.checkpoint import Derivation
from harness.config.checkpoint_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    has_vocabulary,
    header,
    is_adapter,
    multimodal_type,
    read_json_object,
)
from harness.study.errors import UsageError, is_out_of_memory
from harness.train.weights import load_checked

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel

_PROBE_TOKENS = 24
# Largest distance of what is made from its source, in spreads of the logits, by the bytes of a weight: rounding alone.
_TOLERANCE = {4: 1e-3, 2: 0.1}
# Language models that transformers has no class for alone, and the one that they are where all positions are of text.
_SAME_ON_TEXT = {
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe_text": "qwen3_moe",
}


def derive(derivation: Derivation, target: Path) -> None:
    """Write config.json and weights of a derivation into a folder.

    Raises:
        UsageError: where the adapter does not fit its base, cannot be merged, or where the file computes another thing.
    """
    import torch

    make = _merge if derivation.adapter else _take_text
    with _quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # rows of embeddings that no tensor fills: the same in each place
        try:
            logits = make(derivation, target)
        except UsageError:
            raise
        except Exception as error:  # of models and adapters that nobody has tried together
            if getattr(error, "errno", None) or is_out_of_memory(error):  # of the disk, of the machine
                raise
            what = "its adapter cannot be merged into" if derivation.adapter else "no language model can be taken of"
            raise UsageError(f"{what} {derivation.base}: {_first_line(error)}") from error
        gc.collect()  # one model in memory at a time
        _refuse_difference(target, logits, derivation)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the libraries' advice from the terminal: what matters of it is checked."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _merge(derivation: Derivation, target: Path) -> Tensor:
    """Merge an adapter; return the logits of base and adapter before that."""
    import torch
    from peft import PeftModel

    adapter = derivation.adapter
    assert adapter is not None
    with _weights_alone(derivation.base) as folder:
        base = load_checked(_class_of(derivation.base), folder, named=str(derivation.base), dtype="auto")
    _refuse_unknown_settings(adapter)
    rows = base.get_input_embeddings().weight.shape[0]
    is_whole = _resize_embeddings(base, adapter)
    _refuse_lost_tokens(derivation, base.get_input_embeddings().weight.shape[0] if is_whole else rows)
    was_tied = _is_tied(base)
    with torch.no_grad():
        try:
            model = PeftModel.from_pretrained(base, adapter, torch_device="cpu")
            loaded = model.load_adapter(adapter, "default", torch_device="cpu")  # a second time, for what it reports
        except (ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
            raise UsageError(f"its adapter does not fit the base {derivation.base}: {_first_line(error)}") from error
        lost = sorted({*loaded.unexpected_keys, *loaded.missing_keys} - set(_copies(adapter)))
        if lost and all("lora_magnitude_vector" in name for name in lost):
            raise UsageError(
                f"its adapter has the magnitudes of DoRA ({lost[0]}, ...) and {ADAPTER_CONFIG} does not say so; "
                "write use_dora: true there"
            )
        if lost:
            raise UsageError(
                f"its adapter does not fit the base {derivation.base}: {len(lost)} tensors have no counterpart "
                f"({', '.join(lost[:3])}); name the base it was trained on in {ADAPTER_CONFIG}"
            )
        logits = _logits(model.eval())
        if not bool(torch.isfinite(logits).all()):
            raise UsageError(f"base and adapter give no finite logits; {ADAPTER_WEIGHTS} or the base is damaged")
        _unshare(model)
        merged = model.merge_and_unload(safe_merge=True)
    if was_tied:
        _tie_again(merged)
    _save(merged, target)
    return logits


def _refuse_unknown_settings(adapter: Path) -> None:
    """Refuse settings that this version of PEFT leaves out: the adapter would be computed in another way."""
    import peft

    known = vars(peft.PeftConfig.from_pretrained(adapter))
    given = read_json_object(adapter / ADAPTER_CONFIG) or {}
    if unknown := sorted(key for key, value in given.items() if value and key not in known):
        raise UsageError(
            f"its adapter has settings that PEFT {peft.__version__} does not know ({ADAPTER_CONFIG}: "
            f"{', '.join(unknown)}); merge it with the version that made it, and give the merged model"
        )


def _take_text(derivation: Derivation, target: Path) -> Tensor:
    """Save the language model of a multimodal one; return the whole's logits on text."""
    import torch
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    config = AutoConfig.from_pretrained(derivation.base, trust_remote_code=False)
    text_config = _text_config(config)
    cls = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(text_config), None)
    if cls is None or type(text_config) is type(config):
        raise UsageError(_without_text_class(derivation.base))
    whole = load_checked(_class_of(derivation.base), derivation.base, named=str(derivation.base), dtype="auto")
    try:
        with torch.no_grad():
            logits = _logits(whole)
        text_config.dtype, text_config.tie_word_embeddings = whole.dtype, _is_tied(whole)
        with torch.device("meta"):
            text = cls(text_config)
        text.base_model.load_state_dict(whole.get_decoder().state_dict(), assign=True)
        text.get_output_embeddings().load_state_dict(whole.get_output_embeddings().state_dict(), assign=True)
        _save(text, target)
    except (ValueError, AttributeError, RuntimeError, TypeError, NotImplementedError) as error:
        raise UsageError(f"{_without_text_class(derivation.base)} ({_first_line(error)})") from error
    return logits


def _text_config(config: Any) -> Any:
    """Return the config of a multimodal model's language model, as that of a class that transformers has alone."""
    from transformers import AutoConfig

    found = config.get_text_config(decoder=True)
    if found.model_type not in _SAME_ON_TEXT:
        return found
    values = found.to_dict() | {"architectures": None}
    rope = values.get("rope_parameters") or {}
    rope = {key: value for key, value in rope.items() if not key.startswith("mrope")}
    values |= {"rope_parameters": rope, "model_type": _SAME_ON_TEXT[found.model_type]}
    return AutoConfig.for_model(**values)


def _without_text_class(folder: Path) -> str:
    return (
        f"{multimodal_type(folder)} is a multimodal model whose language model transformers has no class for, alone; "
        "give a checkpoint of a language model (...ForCausalLM)"
    )


def _class_of(folder: Path) -> Any:
    """Return the class to load a checkpoint with: the language model's, or a multimodal one's own."""
    import transformers

    if not multimodal_type(folder):
        return transformers.AutoModelForCausalLM
    return transformers.AutoModelForImageTextToText


@contextmanager
def _weights_alone(folder: Path) -> Iterator[Path]:
    """Yield a folder with the weights and without the adapter beside them, which transformers would load as well."""
    if not is_adapter(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory() as place:
        for path in folder.iterdir():
            if path.is_file() and path.name not in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
                (Path(place) / path.name).symlink_to(path.resolve())
        yield Path(place)


def _copies(adapter: Path) -> Iterator[str]:
    """Yield the tensors that PEFT saves a second time where a vocabulary has grown: of a module that is saved whole."""
    from safetensors import safe_open

    marker = ".modules_to_save."
    with safe_open(adapter / ADAPTER_WEIGHTS, framework="pt") as file:
        names = set(file.keys())
        for name in names:
            plain = name.replace(marker, ".")
            if marker in name and plain in names and file.get_tensor(name).equal(file.get_tensor(plain)):
                yield name


def _resize_embeddings(base: PreTrainedModel, adapter: Path) -> bool:
    """Give the base as many rows of embeddings as the adapter was trained with: SFT may have added tokens.

    Returns:
        Whether the adapter holds all rows of the input embeddings.
    """
    modules = {id(module): name for name, module in base.named_modules()}
    rows, is_whole = set(), False
    inputs, outputs = base.get_input_embeddings(), base.get_output_embeddings()
    for part, low_rank in ((inputs, ("lora_embedding_A", 1)), (outputs, ("lora_B.weight", 0))):
        name = modules.get(id(part), "")
        ends = ("weight", "base_layer.weight", "modules_to_save.weight", "token_adapter.base_layer.weight")
        whole = [f"{name}.{rest}" for rest in ends]
        for tensor, entry in (header(adapter / ADAPTER_WEIGHTS) or {}).items():
            plain = tensor.removeprefix("base_model.model.")
            if name and plain in whole:
                rows.add(entry["shape"][0])
                is_whole |= part is inputs
            elif name and plain == f"{name}.{low_rank[0]}":
                rows.add(entry["shape"][low_rank[1]])
    if len(rows) == 1 and (count := rows.pop()) != inputs.weight.shape[0]:
        base.resize_token_embeddings(count, mean_resizing=False)  # the adapter's own rows replace the new ones
    return is_whole


def _refuse_lost_tokens(derivation: Derivation, rows: int) -> None:
    """Refuse tokens that SFT added and whose rows of embeddings were not saved.

    Args:
        derivation: of a merge.
        rows: number of rows that base and adapter hold.
    """
    adapter = derivation.adapter
    if (
        adapter is None
        or adapter == derivation.base
        or not (has_vocabulary(adapter) and has_vocabulary(derivation.base))
    ):
        return
    from transformers import AutoTokenizer

    own, of_base = (
        AutoTokenizer.from_pretrained(folder, trust_remote_code=False).get_vocab()
        for folder in (adapter, derivation.base)
    )
    trained = (read_json_object(adapter / ADAPTER_CONFIG) or {}).get("trainable_token_indices") or []
    saved = {*(trained if isinstance(trained, list) else (index for part in trained.values() for index in part))}
    lost = sorted(
        token for token, index in own.items() if index >= rows and index not in saved and token not in of_base
    )
    if lost:
        raise UsageError(
            f"its tokenizer has {len(lost)} tokens more than its base ({', '.join(lost[:3])}), and {ADAPTER_WEIGHTS} "
            "does not hold their rows of the embeddings; save the adapter with save_embedding_layers=True, or give "
            "the merged model"
        )


def _unshare(model: PeftModel) -> None:
    """Give each module weights of its own: merging into one of two that share theirs would change the other as well."""
    from torch import nn

    seen = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                setattr(module, name, nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad))
            seen.add(id(parameter))


def _is_tied(model: PreTrainedModel) -> bool:
    outputs = model.get_output_embeddings()
    return outputs is not None and outputs.weight is model.get_input_embeddings().weight


def _tie_again(model: PreTrainedModel) -> None:
    """Tie the head to the embeddings; where the adapter trained one of the pair, the config says that they are two."""
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    is_one = inputs.weight.equal(outputs.weight)
    if is_one:
        outputs.weight = inputs.weight
    else:
        model.all_tied_weights_keys = {}
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = is_one


def _save(model: PreTrainedModel, target: Path) -> None:
    model.save_pretrained(target)
    (target / "generation_config.json").unlink(missing_ok=True)  # the source's own is copied, as it is


def _logits(model: Any) -> Tensor:
    """Return a model's logits on fixed tokens of its vocabulary, shape (1, tokens, vocabulary), in fp32."""
    import torch

    with torch.no_grad():
        return torch.as_tensor(model(input_ids=_probe(model), use_cache=False).logits).float()


def _probe(model: Any) -> Tensor:
    """Return ids from the lower half of the vocabulary: the upper end holds placeholders of images and of no token."""
    import torch

    count = max(2, int(model.get_input_embeddings().weight.shape[0]) // 2)
    return torch.randint(1, count, (1, _PROBE_TOKENS), generator=torch.Generator().manual_seed(0))


def _refuse_difference(target: Path, wanted: Tensor, derivation: Derivation) -> None:
    """Load what was made as a study loads it, and compare its logits with those of its source."""
    from transformers import AutoModelForCausalLM

    made = load_checked(AutoModelForCausalLM if derivation.kind == "text" else _class_of(target), target, dtype="auto")
    found = _logits(made)
    if found.shape == wanted.shape:
        distance = float((found - wanted).pow(2).mean().sqrt() / wanted.std().clamp_min(1e-12))
        if distance <= _TOLERANCE.get(made.dtype.itemsize, 0.1):
            return
        why = f"its logits differ by {distance:.2g} of their spread"
    else:
        why = f"its vocabulary has {found.shape[-1]} rows, not {wanted.shape[-1]}"
    what = "base with its adapter merged" if derivation.adapter else "language model alone"
    raise UsageError(f"the {what}, once saved, is not what it was made of ({why}); give a checkpoint of whole weights")


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])[:300]}"
