"""A LoRA layer's forward and backward pass in as few passes over memory as its matrix products allow.

PEFT computes `base(x) + scaling * B(A(x))` by separate layers: each of the sums, and each product with the scaling, is
one more pass over a tensor of the layer's output, forward and backward. Here they go into the matrix products.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch


class _LoraLinear(torch.autograd.Function):
    """y = x W^T + b + (x A^T) (s B)^T, with W and b frozen (Hu et al., arXiv 2106.09685, equation 3)."""

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, bias: Any, down: Any, up: Any, scaling: float) -> Any:
        flat = x.reshape(-1, x.shape[-1])
        inner = flat @ down.t()
        out = flat @ weight.t() if bias is None else torch.addmm(bias, flat, weight.t())
        out.addmm_(inner, up.t(), alpha=scaling)
        ctx.save_for_backward(flat, inner, weight, down, up)
        ctx.scaling, ctx.shape = scaling, x.shape
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        flat, inner, weight, down, up = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        grad_inner = (grad @ up) * ctx.scaling
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ weight
            grad_x.addmm_(grad_inner, down)
            grad_x = grad_x.view(ctx.shape)
        return grad_x, None, None, grad_inner.t() @ flat, (grad.t() @ inner) * ctx.scaling, None


def fuse_adapters(model: Any, name: str = "default") -> int:
    """Let every plain fp32 LoRA layer of a model compute in one function; return how many there are.

    Layers with dropout, DoRA, a trained base weight or another dtype stay as PEFT made them.
    """
    from peft.tuners.lora.layer import Linear

    fused = 0
    for layer in [module for module in model.modules() if type(module) is Linear]:
        weight = layer.get_base_layer().weight
        plain = isinstance(layer.lora_dropout[name], torch.nn.Identity) and not layer.use_dora[name]
        if plain and not weight.requires_grad and weight.dtype == torch.float32 and not layer.lora_bias[name]:
            layer.forward = partial(_forward, layer, name)
            fused += 1
    return fused


def _forward(layer: Any, name: str, x: torch.Tensor) -> torch.Tensor:
    base = layer.get_base_layer()
    if layer.disable_adapters:
        return base(x)
    down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
    return _LoraLinear.apply(x, base.weight, base.bias, down, up, layer.scaling[name])
