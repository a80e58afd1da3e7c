"""The fused adapter in half precision: no farther from fp32 than PEFT's own layers, for one layer and for a training."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from harness.sweep.problems import load_run
from harness.train.adapter import fuse_adapters
from harness.train.logps import pair_logps
from harness.train.memory import plan_of
from harness.train.run import build_trainer, train_arm
from tests.conftest import load_base, overriding, tokens_of, training_overrides

WIDTHS = (96, 160)
CLOSE = 1.5  # times PEFT's gap to fp32: the most that the fused layer's may be


class Block(nn.Module):
    """Two layers that take a LoRA adapter, with a bias and without."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(WIDTHS[0], WIDTHS[1], bias=True)
        self.second = nn.Linear(WIDTHS[1], WIDTHS[0], bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def adapted(dtype: torch.dtype, *, fused: bool) -> Any:
    """Return the block in a dtype, with an adapter in fp32 that is not at its start."""
    base = Block().to(dtype)
    policy = get_peft_model(base, LoraConfig(r=8, lora_alpha=24, target_modules=["first", "second"]))
    generator = torch.Generator().manual_seed(1)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    assert not fused or fuse_adapters(base) == 2
    return policy


def computed(policy: Any, x: Tensor, autocast: torch.dtype | None) -> dict[str, Tensor]:
    """Return the output and all gradients of a loss."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        out = policy(x)
    (out.float() * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    gradients = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return {"output": out.detach(), "input": x.grad, **gradients}


def gaps(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Return the distance of each tensor to the exact one, relative to its norm."""
    return {name: float((found[name].float() - exact[name]).norm() / exact[name].norm()) for name in exact}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["autocast", "autocast, input in fp32", "no autocast"])
def test_it_is_as_close_to_fp32_as_pefts_layers(dtype: torch.dtype, kind: str) -> None:
    """Base weights in half precision, A and B in fp32, with and without autocast: each output and each gradient."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(3, 40, WIDTHS[0], generator=generator).to(dtype)  # the same numbers in fp32
    exact_policy = copy.deepcopy(adapted(dtype, fused=False)).float()
    exact = computed(exact_policy, x.float(), None)
    given = x.float() if "fp32" in kind else x
    autocast = None if kind == "no autocast" else dtype
    ours = computed(adapted(dtype, fused=True), given, autocast)
    theirs = computed(adapted(dtype, fused=False), given, autocast)
    assert {name: each.dtype for name, each in ours.items()} == {name: each.dtype for name, each in theirs.items()}
    assert all(ours[name].dtype == torch.float32 for name in ours if "lora" in name)
    our_gaps, their_gaps = gaps(ours, exact), gaps(theirs, exact)
    for name, gap in our_gaps.items():
        # Without autocast PEFT computes the adapter's part in fp32: one rounding of the result is left.
        allowed = CLOSE * their_gaps[name] if autocast else 4 * torch.finfo(dtype).eps
        assert gap <= allowed, name


def test_fp32_weights_under_autocast_are_left_to_peft() -> None:
    x = torch.randn(2, 5, WIDTHS[0], generator=torch.Generator().manual_seed(3))
    ours = computed(adapted(torch.float32, fused=True), x, torch.bfloat16)
    theirs = computed(adapted(torch.float32, fused=False), x, torch.bfloat16)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def configure(arm: str, *overrides: str) -> Any:
    defaults = [f"+method={arm}", "data.max_train_pairs=80", "method.learning_rate=1e-3", "train.lora_rank=8"]
    return load_run(training_overrides(*overriding(defaults, *overrides)))


def trained(config: Any, folder: Path) -> list[dict[str, float]]:
    tokens, model = tokens_of(config), load_base(config)
    rows, given = tokens.train.rows, None
    if config.method.name == "dpo":
        given = pair_logps(model, rows, pad_id=0, desc="")
    folder.mkdir()
    parts = {"model": model, "chat": tokens.chat, "folder": folder, "reference": given}
    found = train_arm(config, rows, plan_of(config, rows), **parts)
    assert found.packed
    return found.steps


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["dpo", "simpo"])
def test_twenty_steps_in_bf16_are_as_close_to_fp32_as_with_pefts_layers(arm: str, tmp_path: Path) -> None:
    exact = trained(configure(arm, "train.precision=fp32"), tmp_path / "exact")
    ours = trained(configure(arm, "train.precision=bf16"), tmp_path / "ours")
    apart = ["train.precision=bf16", "train.levers.fuse_adapters=false"]
    theirs = trained(configure(arm, *apart), tmp_path / "theirs")
    assert len(exact) == len(ours) == len(theirs) == 20

    def gap(steps: list[dict[str, float]], key: str) -> float:
        """The root mean square over steps, relative."""
        each = [(a[key] / b[key] - 1) ** 2 for a, b in zip(steps, exact, strict=True)]
        return (sum(each) / len(each)) ** 0.5

    for key in ("loss", "grad_norm"):
        assert gap(ours, key) <= CLOSE * gap(theirs, key)


@pytest.mark.parametrize("arm", ["dpo", "simpo"])
def test_both_arms_train_an_adapter_in_fp32_on_a_base_in_bf16(arm: str, tmp_path: Path) -> None:
    config = configure(arm, "train.precision=bf16", "data.max_train_pairs=8")
    tokens, base = tokens_of(config), load_base(config)
    plan = plan_of(config, tokens.train.rows)
    trainer = build_trainer(config, tokens.train.rows, plan, model=base, chat=tokens.chat, output_dir=tmp_path)
    kinds = {(parameter.requires_grad, parameter.dtype) for parameter in trainer.model.parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    layers = [module for module in base.modules() if hasattr(module, "lora_A")]
    assert layers
    assert all("forward" in vars(layer) for layer in layers), "each of them is fused"
