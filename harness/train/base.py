"""The base's weights, loaded once in a process, lent to each trial and given back unchanged.

A trial resets the model, not the process: adapters are taken out, patches removed, trained weights put back.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness.config.checkpoint import checkpoint_dir
from harness.config.machine import has_gpu
from harness.config.schema import Precision, RunConfig, Tuning


def import_logging_libraries() -> None:
    """Import what sets up a logger at its first import, so that `trial_log` can redirect it."""
    importlib.import_module("transformers.utils.logging")


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


def load_base(config: RunConfig, *, on_gpu: bool = True) -> Any:
    """Load the base's weights: fp32 on a CPU; in bf16 where only an adapter is trained on top of it, or in 4 bits.

    Args:
        config: the trial.
        on_gpu: to the GPU, where there is one; else into the machine's memory, to be sharded from there.
    """
    import torch

    tuning = config.train.tuning
    dtype = torch.bfloat16 if uses_bf16(config) and tuning is not Tuning.full else torch.float32
    return load_model(checkpoint_dir(config.model), dtype, quantise=tuning is Tuning.qlora, on_gpu=on_gpu)


def is_quantised(model: Any) -> bool:
    """Return True where a model's weights are in 4 bits."""
    return bool(getattr(model, "is_loaded_in_4bit", False))


def load_model(folder: Path, dtype: Any, *, quantise: bool = False, on_gpu: bool = True) -> Any:
    """Load a causal LM's weights, to the GPU where there is one; in 4-bit NormalFloat where `quantise` says so."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # a bar for each of a hundred loads tells nothing
    safe = {"dtype": dtype, "trust_remote_code": False, "use_safetensors": True}
    if quantise:
        from transformers import BitsAndBytesConfig

        # QLoRA's settings (arXiv 2305.14314, section 3): NF4, with its constants quantised once more.
        four_bits = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        place = {"device_map": {"": "cuda"}} if has_gpu() else {}
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=four_bits, **place, **safe)
        for module in model.modules():
            # Some CPUs have a kernel that rounds to bf16 wherever no gradient is taken: the reference would be computed
            # otherwise than the policy.
            if getattr(module, "support_avx512bf16_for_cpu", False):
                module.support_avx512bf16_for_cpu = False
        return model
    model = AutoModelForCausalLM.from_pretrained(folder, **safe)
    return model.to("cuda") if on_gpu and has_gpu() else model


_held: dict[tuple[Any, ...], Any] = {}
_pristine: dict[tuple[Any, ...], dict[str, Any]] = {}


@contextlib.contextmanager
def borrowed_base(config: RunConfig, *, trains_all: bool = False) -> Iterator[Any]:
    """Yield the base; it is loaded where this process does not hold it yet, or where `train.levers.reuse_base` is off.

    Args:
        config: the trial.
        trains_all: True where the weights themselves will be trained; a copy is kept in memory to put them back.
    """
    if not config.train.levers.reuse_base:
        yield load_base(config)
        return
    key = (checkpoint_dir(config.model), uses_bf16(config), config.train.tuning)
    model = _held.pop(key, None)
    if model is None:
        _held.clear()  # one base in memory, not two
        _pristine.clear()
        model = load_base(config)
    attention, sums = model.config._attn_implementation, _checksums(model)
    if trains_all and key not in _pristine:
        _pristine[key] = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    yield model  # after an error the model is not held: its state is unknown
    _reset(model)
    model.set_attn_implementation(attention)
    if trains_all:
        model.load_state_dict(_pristine[key])
    if _checksums(model) == sums:  # a base that something changed, NaN included, is not lent again
        _held[key] = model


def release_base() -> None:
    """Forget the base, so that its memory is free."""
    import torch

    _held.clear()
    _pristine.clear()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _checksums(model: Any) -> list[int]:
    """Return the sum of each weight's bits: one pass over memory, to notice a base that is not what it was."""
    import torch

    sums = []
    for tensor in model.state_dict().values():
        bits = tensor.contiguous().view(-1).view(torch.uint8)
        words = len(bits) // 8 * 8  # as 64-bit integers, which wrap around: exact, and at the speed of memory
        sums.append(bits[:words].view(torch.int64).sum().item() + bits[words:].sum().item())
    return sums


def _reset(model: Any) -> None:
    """Undo what trainers and PEFT do to a model."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            model.set_submodule(name, module.get_base_layer())
    for patched in ("forward", "peft_config"):
        model.__dict__.pop(patched, None)
    if model.is_gradient_checkpointing:
        model.gradient_checkpointing_disable()
        model.disable_input_require_grads()
    model.zero_grad(set_to_none=True)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())  # 4-bit weights are bytes
    model.eval()


@contextlib.contextmanager
def borrowed_policy(config: RunConfig, folder: Path) -> Iterator[Any]:
    """Yield what a trial has trained: its full model, or the base with its adapter.

    In fp32 the adapter is merged, which makes generation faster: the layers' weights are exchanged for merged ones and
    put back afterwards, so that nothing is rounded. In bf16 or 4 bits merging would round away a small adapter: it is
    left apart.
    """
    import torch
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    if (folder / "model").is_dir():
        yield load_model(folder / "model", torch.float32)
        return
    with borrowed_base(config) as base:
        policy: Any = PeftModel.from_pretrained(base, folder / "adapter")
        if base.dtype != torch.float32 or is_quantised(base):
            yield policy
            return
        kept = {}
        for layer in [module for module in policy.modules() if isinstance(module, LoraLayer)]:
            weight = layer.get_base_layer().weight
            kept[weight] = weight.data
            weight.data = weight.data + layer.get_delta_weight("default")
        try:
            yield policy.unload()
        finally:
            for weight, data in kept.items():
                weight.data = data
