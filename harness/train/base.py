"""The weights of a model: from a checkpoint's folder to a model in memory, and `Bases`, the base cache of one process.

A process that runs several trials loads the base once. A trial borrows it and gives it back unchanged: adapters are
taken out, patches removed, trained weights put back.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from harness.config.machine import has_gpu
from harness.config.schema import Kernels, ModelConfig, Precision, RunConfig, Tuning
from harness.study.errors import UsageError
from harness.train.memory import free_unused_memory
from harness.train.weights import load_checked

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel


def import_logging_libraries() -> None:
    """Import the libraries that configure a logger at import, so that `trial_log` can redirect it."""
    importlib.import_module("transformers.utils.logging")


@contextlib.contextmanager
def threads(config: RunConfig) -> Iterator[None]:
    """Run with torch's number of threads at `train.threads` (null: torch's own), and put it back for the next study."""
    import torch

    before = torch.get_num_threads()
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def uses_bf16(config: RunConfig) -> bool:
    """Return True where matrix products run in bf16: as requested, or on a GPU with bf16 (on a CPU it is slower).

    Older GPUs emulate it, slower than fp32.
    """
    import torch

    if config.train.precision is Precision.auto:
        return has_gpu() and torch.cuda.is_bf16_supported(including_emulation=False)
    return config.train.precision is Precision.bf16


def uses_tf32(config: RunConfig) -> bool:
    """Return True where a training's products of fp32 matrices are in TF32: on a GPU that does not train in bf16.

    In bf16 they stay exact: what is left in fp32 there is small, such as positions in some models, which TF32 rounds.
    """
    return has_gpu() and not uses_bf16(config)


def is_quantised(model: PreTrainedModel) -> bool:
    """Return True where a model's weights are in 4 bits."""
    return bool(getattr(model, "is_loaded_in_4bit", False))


def weights_dtype(config: RunConfig, *, trains_all: bool = False) -> torch.dtype:
    """Return the dtype of a model's weights: fp32, or bf16 where products run in it and no weight of it is trained.

    Weights that are trained stay in fp32: at the rates of full fine-tuning (1e-6) a step is smaller than the distance
    of two numbers in bf16, and would be lost.

    Args:
        config: the trial.
        trains_all: True for the model whose weights are trained by `train.tuning=full`.
    """
    import torch

    return torch.bfloat16 if uses_bf16(config) and not trains_all else torch.float32


def load_base(config: RunConfig, folder: Path, *, on_gpu: bool = True, answers: bool = False) -> PreTrainedModel:
    """Load the base's weights: as they are trained, in 4 bits for QLoRA.

    Args:
        config: the trial.
        folder: of the checkpoint.
        on_gpu: to the GPU, where there is one; else into the machine's memory, to be sharded from there.
        answers: as a model that answers and is not trained, in the precision of the policies that do so.
    """
    tuning = config.train.tuning
    dtype = weights_dtype(config, trains_all=tuning is Tuning.full and not answers)
    model = load_model(folder, dtype, quantise=tuning is Tuning.qlora, on_gpu=on_gpu)
    return use_kernels(model, config.train.kernels, compare=on_gpu)


def load_model(folder: Path, dtype: torch.dtype, *, quantise: bool = False, on_gpu: bool = True) -> PreTrainedModel:
    """Load a causal LM's weights, straight to the GPU where there is one; in 4-bit NormalFloat with `quantise`.

    Raises:
        UsageError: where a parameter is not in the files (see `harness.train.weights`).
    """
    import torch
    from transformers import AutoModelForCausalLM

    from harness.train.pure import make_pure

    # By number: the trainer takes a model on "cuda" for one that is spread over GPUs.
    place = {"": torch.cuda.current_device()} if on_gpu and has_gpu() else None
    if quantise:
        from transformers import BitsAndBytesConfig

        # QLoRA's settings (arXiv 2305.14314, section 3): NF4, with its constants quantised once more.
        four_bits = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        quantised = load_checked(
            AutoModelForCausalLM, folder, dtype=dtype, quantization_config=four_bits, device_map=place
        )
        for module in quantised.modules():
            # Some CPUs' kernel rounds to bf16 in passes without gradients: reference and policy would differ.
            if getattr(module, "support_avx512bf16_for_cpu", False):
                module.support_avx512bf16_for_cpu = False
        return make_pure(quantised)
    return make_pure(load_checked(AutoModelForCausalLM, folder, dtype=dtype, device_map=place))


# Liger's names of what is fused: norms, and gated layers with SiLU or GELU. Its losses are never taken, and its rotary
# positions change transformers' own module, for all models of the process.
_FUSED = ("rms_norm", "swiglu", "geglu")
_GAP = 1e-3  # of logits' and gradients' spread, in fp32; 100 times as much in 16 bits


def use_kernels(model: PreTrainedModel, kernels: Kernels, *, compare: bool = True) -> PreTrainedModel:
    """Give a loaded model the kernels of `train.kernels`; return it. Other models of the process keep theirs.

    Args:
        model: a causal LM.
        kernels: which.
        compare: hold logits and a gradient to those of the model's own code; not where it will be sharded from memory.

    Raises:
        UsageError: where liger-kernel has none for this class of model, or where they compute something else.
    """
    if kernels is Kernels.none:
        return model
    applied = importlib.import_module("liger_kernel.transformers.monkey_patch").MODEL_TYPE_TO_APPLY_LIGER_FN
    apply = applied.get(model.config.model_type)
    if apply is None:
        raise UsageError(
            f"train.kernels=liger: liger-kernel has no kernels for a {type(model).__name__}; use train.kernels=none"
        )
    flags = inspect.signature(apply).parameters.values()
    chosen = {each.name: each.name in _FUSED for each in flags if isinstance(each.default, bool)}
    module = vars(importlib.import_module(type(model).__module__))
    before, own = dict(module), _logits_and_gradient(model) if compare else ()
    apply(model=model, **chosen)
    module.update(before)  # it has put its classes there, too, for models that are made later
    theirs = _logits_and_gradient(model) if compare else ()
    gaps = [float((a - b).abs().max() / a.std()) for a, b in zip(own, theirs, strict=True)]
    if not all(gap <= (_GAP if model.dtype.itemsize == 4 else 100 * _GAP) for gap in gaps):  # NaN is not below either
        raise UsageError(
            f"train.kernels=liger: its kernels change logits or gradients of this {type(model).__name__} (by "
            f"{gaps[0]:.2g} and {gaps[1]:.2g} of their spread); use train.kernels=none"
        )
    return model


def _logits_and_gradient(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits of some ids and the gradient of their weighted sum at the embeddings, in fp32."""
    import torch

    ids = torch.arange(1, 17, device=model.device)[None] % model.config.get_text_config().vocab_size
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=embedded, use_cache=False).logits.float()
    weights = torch.linspace(-1, 1, logits.numel(), device=logits.device).view_as(logits)
    (gradient,) = torch.autograd.grad((logits * weights).sum(), embedded)
    return logits.detach(), gradient.float()


class BaseKey(NamedTuple):
    """What makes two bases in memory the same: checkpoint, precision of its weights, 4 bits or not, and kernels."""

    folder: Path
    dtype: str
    quantised: bool
    kernels: Kernels


class Bases:
    """The base cache: at most one base. One whose weights are trained is not kept: its checkpoint is read again.

    Args:
        folder_of: finds a checkpoint's folder, from the section `model` and `results_dir`.
    """

    def __init__(self, folder_of: Callable[[ModelConfig, str], Path]) -> None:
        self._folder_of = folder_of
        self._models: dict[BaseKey, PreTrainedModel] = {}
        self._sums: dict[BaseKey, list[int]] = {}
        self._has_loaded = False

    @contextlib.contextmanager
    def borrow_base(
        self, config: RunConfig, *, trains_all: bool = False, answers: bool = False
    ) -> Iterator[PreTrainedModel]:
        """Yield the base; it is loaded where it is not in the cache, or where `train.levers.reuse_base` is off.

        Args:
            config: the trial.
            trains_all: True where the weights themselves will be trained.
            answers: as in `load_base`.
        """
        folder = self._folder_of(config.model, config.results_dir)
        if not config.train.levers.reuse_base:
            yield load_base(config, folder, answers=answers)
            return
        tuning = config.train.tuning
        dtype = weights_dtype(config, trains_all=tuning is Tuning.full and not answers)
        key = BaseKey(folder, str(dtype), tuning is Tuning.qlora, config.train.kernels)
        model = self._models.pop(key, None)
        if model is None:
            self._make_room()
            model = load_base(config, folder, answers=answers)
            if not trains_all:
                self._sums[key] = weight_checksums(model)  # once: each loan ends with the same sums
        if trains_all:
            yield model
            return
        attention = model.config._attn_implementation
        yield model  # after an error the model is not kept: its state is unknown
        reset_model(model)
        model.set_attn_implementation(attention)
        # A base whose weights have changed, NaN included, is not lent again.
        if weight_checksums(model) == self._sums[key]:
            self._models[key] = model

    @contextlib.contextmanager
    def borrow_policy(self, config: RunConfig, folder: Path) -> Iterator[PreTrainedModel | PeftModel]:
        """Yield the policy in a trial's folder: its full model, or the base with its adapter.

        In fp32 the adapter is merged, which makes generation faster: the layers' weights are exchanged for merged ones
        and put back afterwards, so that nothing is rounded. In bf16 and 4 bits the adapter stays apart, since merging
        would round a small adapter away.
        """
        import torch
        from peft import PeftModel
        from peft.tuners.lora import LoraLayer

        from harness.train.adapter import adapted_weight

        if (folder / "model").is_dir():
            self._make_room()
            yield use_kernels(load_model(folder / "model", weights_dtype(config)), config.train.kernels)
            return
        with self.borrow_base(config) as base:
            policy = PeftModel.from_pretrained(base, folder / "adapter")
            if base.dtype != torch.float32 or is_quantised(base):
                yield policy
                return
            originals = {}
            for layer in [module for module in policy.modules() if isinstance(module, LoraLayer)]:
                weight = adapted_weight(layer)
                originals[weight] = weight.data
                weight.data = weight.data + layer.get_delta_weight("default")
            try:
                yield policy.unload()
            finally:
                for weight, data in originals.items():
                    weight.data = data

    def _make_room(self) -> None:
        """Drop the model before the next one is loaded, a trained one included: one in memory, not two."""
        if self._has_loaded:
            self.release()
        self._has_loaded = True

    def release(self) -> None:
        """Drop the base, so that its memory is free for what comes next: another model, or another process."""
        self._models.clear()
        free_unused_memory()


def reset_model(model: PreTrainedModel) -> None:
    """Undo the changes that trainers and PEFT make to a model: adapters, patched methods, gradients, modes."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted: list[str] = []
    for name, module in list(model.named_modules()):
        # A layer with several adapted weights is wrapped once per weight: the outermost holds the layer itself.
        if isinstance(module, BaseTunerLayer) and not name.startswith(tuple(f"{outer}." for outer in adapted)):
            model.set_submodule(name, module.get_base_layer())
            adapted.append(name)
    for patched in ("forward", "peft_config"):
        model.__dict__.pop(patched, None)
    if model.is_gradient_checkpointing:
        model.gradient_checkpointing_disable()
        model.disable_input_require_grads()
    model.zero_grad(set_to_none=True)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())  # 4-bit weights are bytes
    model.eval()


def weight_checksums(model: PreTrainedModel) -> list[int]:
    """Return the sum of each weight's bits: one pass over memory, which detects a base that has changed.

    On a device the sums are read in one copy.
    """
    import torch

    sums: list[torch.Tensor] = []
    for tensor in model.state_dict().values():
        bits = tensor.contiguous().view(-1).view(torch.uint8)
        words = len(bits) // 8 * 8  # as 64-bit integers, which wrap around: exact, and at the speed of memory
        sums.append(bits[:words].view(torch.int64).sum() + bits[words:].sum())
    found: list[int] = torch.stack([each.to(sums[0].device) for each in sums]).tolist()
    return found
