"""The adapter on the base: made, counted, saved, and computed in one function per layer; or the whole trained model."""

from __future__ import annotations

import re
import shutil
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from harness.config.checkpoint import is_derived
from harness.config.schema import ALL_LINEAR, RunConfig, Tuning, is_pattern
from harness.study.errors import UsageError, is_out_of_memory

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from peft.tuners.lora.layer import Linear, LoraLayer
    from torch.autograd.function import BackwardCFunction
    from transformers import PreTrainedModel, Trainer

    class LoraContext(BackwardCFunction):
        """The context of `_LoraLinear`."""

        scaling: float
        shape: torch.Size
        dtypes: tuple[torch.dtype, torch.dtype]


def adapter_config(config: RunConfig, model: PreTrainedModel) -> LoraConfig:
    """Return the adapter on the layers of `train.lora_targets`; all its settings are equal in all arms.

    Raises:
        UsageError: for a target that the model has not.
    """
    from peft import LoraConfig

    return LoraConfig(
        r=config.train.lora_rank,
        lora_alpha=config.train.lora_alpha,
        lora_dropout=config.train.lora_dropout,
        target_modules=target_layers(config, model),
        exclude_modules=_not_adapted(model) or None,
        task_type="CAUSAL_LM",
    )


def target_layers(config: RunConfig, model: PreTrainedModel) -> str | list[str]:
    """Return which layers get the adapter, as PEFT takes it: `all-linear`, ends of names, or whole names.

    Raises:
        UsageError: for a target that is no linear layer of the model; it says which there are.
    """
    targets = config.train.lora_targets
    if targets == [ALL_LINEAR]:
        return ALL_LINEAR
    layers = _adaptable_layers(model)
    found: list[str] = []
    for target in targets:
        ends, whole = re.compile(rf"(.*\.)?{re.escape(target)}"), re.compile(target)
        matched = [name for name in layers if (whole if is_pattern(target) else ends).fullmatch(name)]
        if not matched:
            known = ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
            what = f"whose whole name {target} matches" if is_pattern(target) else f"of the name {target}"
            raise UsageError(
                f"train.lora_targets=[{','.join(targets)}]: a {type(model).__name__} has no linear layer {what} beside "
                f"its head; it has {known}; or use [{ALL_LINEAR}]"
            )
        found += matched if is_pattern(target) else [target]
    return found


def _adaptable_layers(model: PreTrainedModel) -> list[str]:
    """Return the names of the layers that an adapter may be put on."""
    from transformers.pytorch_utils import Conv1D

    head, excluded = model.get_output_embeddings(), set(_not_adapted(model))
    kinds = (torch.nn.Linear, Conv1D)
    names = [name for name, module in model.named_modules() if isinstance(module, kinds) and module is not head]
    return [name for name in names if name not in excluded]


def check_targets(config: RunConfig, folder: Path) -> None:
    """Refuse targets that a checkpoint's model has not, from its config.json alone.

    Raises:
        UsageError: as `target_layers`.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    target_layers(config, model)


# State-space models run the weights of these layers in kernels that see no adapter; PEFT refuses them by name.
_IN_KERNELS = ("out_proj", "conv1d")
_STATE_SPACE = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")


def _not_adapted(model: PreTrainedModel) -> list[str]:
    """Return the names of linear layers that cannot have an adapter: in kernels, or with more than a tensor as output.

    Some routers are subclasses of `nn.Linear` that return scores and logits.
    """
    in_kernels = model.config.get_text_config().model_type in _STATE_SPACE
    return sorted(
        name
        for name, module in model.named_modules()
        if (in_kernels and name.endswith(_IN_KERNELS)) or (_is_own_linear(module) and not _returns_tensor(module))
    )


def _is_own_linear(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear) and type(module).forward is not torch.nn.Linear.forward


@torch.no_grad()
def _returns_tensor(layer: torch.nn.Linear) -> bool:
    if not layer.weight.is_floating_point():  # 4-bit and 8-bit layers, which PEFT has adapters for
        return True
    try:
        return isinstance(layer(layer.weight.new_zeros(2, layer.in_features)), Tensor)
    except Exception as error:  # called in another way than `nn.Linear`, so that an adapter cannot call it
        if is_out_of_memory(error):
            raise
        return False


def restore_adapter_dropout(model: PeftModel | PreTrainedModel, dropout: float) -> None:
    """Set the adapter's dropout, which TRL's trainers switch off with the base's."""
    from peft.tuners.lora import LoraLayer

    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            for module in layer.lora_dropout.values():
                if isinstance(module, torch.nn.Dropout):
                    module.p = dropout


def adapter_on_quantised(base: PreTrainedModel, config: RunConfig) -> PeftModel:
    """Put the adapter on a 4-bit base before TRL does (QLoRA, arXiv 2305.14314).

    TRL's trainers differ here: DPOTrainer converts the adapter to bf16; CPOTrainer does so only where it trains in
    bf16, and then converts the base's other weights to fp32. Here all arms start from the same bits.
    """
    from peft import get_peft_model
    from transformers import set_seed

    set_seed(config.seed)  # as TRL's trainers do before they make an adapter
    return get_peft_model(base, adapter_config(config, base))


def undo_quantised_extras(model: PeftModel, *, start: dict[str, Tensor], has_reference: bool) -> None:
    """Undo the changes of TRL's DPOTrainer to an adapter on a 4-bit base, which its CPOTrainer does not make.

    DPOTrainer converts the adapter to bf16, and copies it as a reference, which is unused where the base's log-probs
    are given.

    Args:
        model: the trainer's model, before any training.
        start: the adapter as it was made, by name.
        has_reference: whether the base's log-probs are given.
    """
    if has_reference and "ref" in model.peft_config:
        model.delete_adapter("ref")
    for name, parameter in model.named_parameters():
        if name in start:
            parameter.data = start[name]


def trained_weights(model: PeftModel | PreTrainedModel) -> dict[str, Tensor]:
    """Return a copy of the trained weights, by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def count_parameters(model: PeftModel | PreTrainedModel) -> dict[str, int]:
    """Count weights, `total` and `trainable`; a byte of a 4-bit base holds two."""
    counts = [(p.numel() * (2 if type(p).__name__ == "Params4bit" else 1), p.requires_grad) for p in model.parameters()]
    return {"total": sum(count for count, _ in counts), "trainable": sum(count for count, trained in counts if trained)}


def save_weights(trainer: Trainer, folder: Path, config: RunConfig) -> None:
    """Save the weights under a temporary name and rename: a folder that exists is complete.

    An adapter names its base by `model.path`, not by its folder on this machine. Of several processes the first one
    writes; where weights are sharded, all of them take part in gathering.
    """
    is_adapter = config.train.tuning is not Tuning.full
    target = folder / ("adapter" if is_adapter else "model")
    temporary = folder / f".{target.name}.tmp"
    gathered = config.accelerate.num_processes > 1
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped) if gathered else None
    if not trainer.is_world_process_zero():
        return
    model = trainer.accelerator.unwrap_model(trainer.model)
    shutil.rmtree(temporary, ignore_errors=True)
    more: dict[str, list[str] | bool] = {}
    if is_adapter:
        about = model.active_peft_config
        if not is_derived(Path(about.base_model_name_or_path)):  # else what was made of model.path is the base
            about.base_model_name_or_path = config.model.path
        for targets in ("target_modules", "target_parameters", "exclude_modules"):
            if getattr(about, targets, None):  # the order of a set differs between processes
                setattr(about, targets, sorted(getattr(about, targets)))
        more["selected_adapters"] = ["default"]
        more["save_embedding_layers"] = False  # PEFT would ask the Hub about the base's vocabulary
    model.save_pretrained(temporary, safe_serialization=True, **({"state_dict": state} if gathered else {}), **more)
    (temporary / "README.md").unlink(missing_ok=True)  # a template to be filled in, with the path of the base
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)


def adapted_weight(layer: LoraLayer) -> Tensor:
    """Return the frozen weight that a LoRA layer adapts: a layer's `weight`, or a parameter of experts."""
    get_param = getattr(layer, "get_param", None)
    weight: Tensor = get_param() if get_param else layer.get_base_layer().weight
    return weight


_FUSED_IN = (torch.float32, torch.bfloat16, torch.float16)


def fuse_adapters(model: PreTrainedModel, name: str = "default") -> int:
    """Compute every plain LoRA layer of a model in one function; return the number of such layers.

    In half precision the adapter's matrices stay in fp32, and are rounded for the products alone. Layers with dropout,
    DoRA, a trained base weight or weights in 4 or 8 bits stay as PEFT made them, and so do those that merely behave
    like `nn.Linear` (GPT-2's Conv1D, which is transposed; subclasses; parametrised layers) or are watched by hooks.
    """
    from peft.tuners.lora.layer import Linear

    fused = 0
    for layer in [module for module in model.modules() if type(module) is Linear]:
        if not _is_plain_linear(layer.get_base_layer()):
            continue
        weight = layer.get_base_layer().weight
        plain = isinstance(layer.lora_dropout[name], torch.nn.Identity) and not layer.use_dora[name]
        if plain and not weight.requires_grad and weight.dtype in _FUSED_IN and not layer.lora_bias[name]:
            layer.forward = partial(_fused_forward, layer, name)
            fused += 1
    return fused


def _is_plain_linear(layer: torch.nn.Module) -> bool:
    """Whether a layer computes `x W^T + b` and nothing else."""
    has_hooks = bool(layer._forward_hooks or layer._forward_pre_hooks)
    return type(layer) is torch.nn.Linear and "forward" not in vars(layer) and not has_hooks


def _fused_forward(layer: Linear, name: str, x: Tensor) -> Tensor:
    base = layer.get_base_layer()
    if layer.disable_adapters:
        return base(x)
    weight, kind = base.weight, x.device.type
    if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != weight.dtype:
        return type(layer).forward(layer, x)  # PEFT's own: the weight itself would be rounded in each call
    down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
    return _LoraLinear.apply(x.to(weight.dtype), weight, base.bias, down, up, layer.scaling[name])


class _LoraLinear(torch.autograd.Function):
    """y = x W^T + b + (x A^T) (s B)^T, with W and b frozen (Hu et al., arXiv 2106.09685, equation 3).

    A and B are rounded to the dtype of x and W, as autocast does; their gradients have their own dtype.
    """

    @staticmethod
    def forward(
        ctx: LoraContext, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scaling: float
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        ctx.dtypes = down.dtype, up.dtype
        down, up = down.to(x.dtype), up.to(x.dtype)
        inner = flat @ down.t()
        # No view is returned: some models change a layer's output in place, which autograd forbids for views.
        found = x.new_empty((*x.shape[:-1], weight.shape[0]))
        out = found.view(-1, weight.shape[0])
        if bias is None:
            torch.mm(flat, weight.t(), out=out)
        else:
            torch.addmm(bias, flat, weight.t(), out=out)
        out.addmm_(inner, up.t(), alpha=scaling)
        ctx.save_for_backward(flat, inner, weight, down, up)
        ctx.scaling, ctx.shape = scaling, x.shape
        return found

    @staticmethod
    def backward(ctx: LoraContext, grad: Tensor) -> tuple[Tensor | None, ...]:
        flat, inner, weight, down, up = list(ctx.saved_tensors)
        grad = grad.reshape(-1, grad.shape[-1])
        grad_inner = (grad @ up) * ctx.scaling
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ weight
            grad_x.addmm_(grad_inner, down)
            grad_x = grad_x.view(ctx.shape)
        grad_down, grad_up = grad_inner.t() @ flat, (grad.t() @ inner) * ctx.scaling
        return grad_x, None, None, grad_down.to(ctx.dtypes[0]), grad_up.to(ctx.dtypes[1]), None
