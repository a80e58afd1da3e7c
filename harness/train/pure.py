"""A model's forward pass as a function of one row alone: no noise, no loss of its own, no look at the batch's width.

`make_pure` is called where a model is loaded, so that the base, every arm and the reference are mended alike. What it
knows is switched off here; what it does not know is found by `harness.train.preconditions`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_NOISE = re.compile(r"drop|jitter")  # in the name of a number between 0 and 1
_OWN_LOSS = ("output_router_logits",)  # flags by which a model adds a loss of its own
_SWITCHED_OFF = "harness_switched_off"  # attribute of a model
_BY_LENGTH = re.compile(r"dynamic|longrope")  # rotary frequencies that transformers takes from the longest row


def make_pure(model: PreTrainedModel) -> PreTrainedModel:
    """Switch off what makes a model's output depend on anything else than a row's own tokens; return the model."""
    found = [*_without_noise(model), *_without_own_loss(model), *_with_positions_of_each_row(model)]
    vars(model)[_SWITCHED_OFF] = found
    return model


def switched_off(model: PreTrainedModel) -> list[str]:
    """Return what `make_pure` has changed, one phrase each, in the words of the checkpoint's config."""
    found: list[str] = vars(model).get(_SWITCHED_OFF, [])
    return found


def make_still(model: torch.nn.Module) -> None:
    """Put the parts of a model into evaluation mode, except where training mode recomputes activations.

    For a model whose training mode draws random numbers that no number in its config switches off. The outermost
    module keeps its mode, by which trainers know that they train, and so does the adapter's own dropout.
    """
    for name, module in model.named_modules():
        if name and not getattr(module, "gradient_checkpointing", False) and ".lora_dropout." not in f".{name}.":
            module.training = False


def _configs(config: PreTrainedConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield a config and the configs inside of it, with the prefix of their names."""
    from transformers import PreTrainedConfig

    yield prefix, config
    for name, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            yield from _configs(value, f"{prefix}{name}.")


def _is_noise(name: str, value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return bool(_NOISE.search(name)) and 0 < value <= 1


def _without_noise(model: PreTrainedModel) -> Iterator[str]:
    """Set every dropout, jitter and dropped layer to 0, in the configs and in the modules that have copied it."""
    for prefix, config in _configs(model.config):
        for name, value in list(vars(config).items()):
            if _is_noise(name, value):
                setattr(config, name, type(value)())  # configs check the types of their fields
                yield f"{prefix}{name}={value:g}"
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if _is_noise(name, value):
                setattr(module, name, type(value)())


def _without_own_loss(model: PreTrainedModel) -> Iterator[str]:
    """Switch off the losses that a model adds by itself; trainers differ in whether they take them over."""
    for prefix, config in _configs(model.config):
        for name in _OWN_LOSS:
            if getattr(config, name, False):
                setattr(config, name, False)
                yield f"{prefix}{name}=true"
    if hasattr(model.config.get_text_config(), "output_router_logits"):
        coef = getattr(model.config.get_text_config(), "router_aux_loss_coef", 0.0)
        if coef:
            yield f"the router's loss (router_aux_loss_coef={coef:g})"


def _with_positions_of_each_row(model: PreTrainedModel) -> Iterator[str]:
    """Take rotary frequencies from each row's own length, where transformers takes them from the longest row's.

    Dynamic NTK even keeps those of the longest row that it has ever seen.
    """
    types: set[str] = set()
    for module in model.modules():
        found = getattr(module, "rope_type", None)
        named = found.values() if isinstance(found, dict) else [found]
        by_length = {str(name) for name in named if name and _BY_LENGTH.search(str(name))}
        if by_length:
            module.forward = functools.partial(_rotary_by_row, module, module.forward)
            types |= by_length
    if types:
        model.base_model.register_forward_pre_hook(_give_positions, with_kwargs=True)
        yield f"positions by the batch's longest row (rope_type={', '.join(sorted(types))})"


def _give_positions(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Add each row's own positions, from which its length can be read, where the caller gives a mask only.

    Raises:
        NotImplementedError: for a packed row, in which a prompt has as many lengths as answers.
    """
    if kwargs.get("packed") is not None:
        raise NotImplementedError("the model's positions depend on a row's length, which a shared prompt has not")
    mask = kwargs.get("attention_mask")
    ids = args[0] if args else kwargs.get("input_ids")
    if ids is None:
        ids = kwargs.get("inputs_embeds")
    if kwargs.get("position_ids") is not None or not isinstance(mask, Tensor) or ids is None:
        return args, kwargs
    if mask.dim() == 2 and mask.shape == ids.shape[:2]:
        kwargs["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)
    return args, kwargs


@torch.no_grad()
def _rotary_by_row(
    module: Any, forward: Callable[..., Any], x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any
) -> Any:
    """Return a rotary embedding's tensors, each row's as if it were alone: position_ids (rows, width)."""
    if position_ids.dim() != 2:  # positions of images, too
        return forward(x, position_ids, *args, **kwargs)
    longest = position_ids.max(dim=-1).values
    parts: dict[int, Any] = {}
    for length in longest.unique().tolist():
        _forget_lengths(module)
        parts[length] = forward(x, position_ids[longest == length], *args, **kwargs)
    if len(parts) == 1:
        return next(iter(parts.values()))
    first = next(iter(parts.values()))
    if isinstance(first, Tensor):
        return _rows_of(parts, longest)
    return tuple(_rows_of({length: part[i] for length, part in parts.items()}, longest) for i in range(len(first)))


def _rows_of(parts: dict[int, Tensor], longest: Tensor) -> Tensor:
    first = next(iter(parts.values()))
    rows = first.new_empty((len(longest), *first.shape[1:]))
    for length, part in parts.items():
        rows[longest == length] = part
    return rows


def _forget_lengths(module: Any) -> None:
    """Undo what a rotary embedding has kept of the rows before, one set of frequencies per type of layer."""
    for name, original in list(vars(module).items()) + list(module.named_buffers(recurse=False)):
        if not name.endswith("original_inv_freq") or not isinstance(original, Tensor):
            continue
        prefix = name.removesuffix("original_inv_freq")
        current = getattr(module, f"{prefix}inv_freq")
        if current.shape == original.shape:
            module.register_buffer(f"{prefix}inv_freq", original.to(current.device, copy=True), persistent=False)
        if hasattr(module, "original_max_seq_len"):
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
