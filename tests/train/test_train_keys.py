"""What `train.optimizer`, `train.lora_targets`, `train.kernels` and TF32 do, and what of them is refused by name."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel
from transformers.models.llama import modeling_llama

import harness.sweep.__main__
import harness.train.base
from harness.config.arms import ARMS
from harness.config.schema import Kernels, Optimizer, RunConfig
from harness.data.plan import ConsumedTokens
from harness.study.errors import UsageError
from harness.sweep.problems import load_run
from harness.train.adapter import target_layers
from harness.train.base import BaseKey, use_kernels, uses_bf16, uses_tf32
from harness.train.memory import plan_of
from harness.train.run import build_trainer, common_arguments, tf32
from tests.conftest import load_base, overriding, tiny_model, tokens_of, training_overrides


def configure(*overrides: str) -> RunConfig:
    return load_run(training_overrides(*overriding(["+method=dpo", "data.max_train_pairs=8"], *overrides)))


@pytest.mark.parametrize(
    ("name", "its"), [("auto", "adamw_torch"), ("adamw", "adamw_torch"), ("adamw_8bit", "adamw_bnb_8bit")]
)
def test_the_optimizer_is_the_same_in_every_arm(name: str, its: str, tmp_path: Path) -> None:
    """On a CPU; on a GPU `auto` is torch's fused AdamW."""
    for arm in (arm for arm, row in ARMS.items() if row.trainer):
        config = configure(f"+method={arm}", f"train.optimizer={name}")
        plan = plan_of(config, tokens_of(config).train.rows)
        assert common_arguments(config, plan, tmp_path)["optim"] == its


def test_adamw_in_8_bits_trains(tmp_path: Path) -> None:
    """With bitsandbytes' kernels for CPUs; small tensors stay in 32 bits there."""
    config = configure("train.optimizer=adamw_8bit", "+method=simpo")
    tokens = tokens_of(config)
    rows = tokens.train.rows
    parts: dict[str, Any] = {"model": load_base(config), "chat": tokens.chat, "output_dir": tmp_path}
    trainer = build_trainer(config, rows, plan_of(config, rows), **parts)
    trainer.consumed = ConsumedTokens()
    before = [parameter.detach().clone() for parameter in trainer.model.parameters() if parameter.requires_grad]
    trainer.train()
    assert type(trainer.optimizer.optimizer).__module__.startswith("bitsandbytes")
    after = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(torch.isfinite(parameter).all() for parameter in after)


def test_8_bits_without_bitsandbytes_are_refused(monkeypatch) -> None:
    monkeypatch.setattr("harness.train.stage.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"train\.optimizer=adamw_8bit: bitsandbytes is not installed; pip install"):
        configure("train.optimizer=adamw_8bit")


def targets(model: PreTrainedModel, *given: str) -> str | list[str]:
    config = configure()
    return target_layers(replace(config, train=replace(config.train, lora_targets=list(given))), model)


def test_targets_are_ends_of_names_or_patterns_of_whole_names() -> None:
    model = tiny_model()
    assert targets(model, "all-linear") == "all-linear"
    assert targets(model, "q_proj", "mlp.up_proj") == ["q_proj", "mlp.up_proj"]
    both = [f"model.layers.0.self_attn.{name}_proj" for name in "qv"]
    assert targets(model, r"model\.layers\.0\.self_attn\.(q|v)_proj") == both
    assert targets(model, r".*\.1\..*down_proj", "k_proj") == ["model.layers.1.mlp.down_proj", "k_proj"]
    gpt2 = tiny_model(GPT2Config, GPT2LMHeadModel, n_embd=32, n_head=4, n_layer=2, n_positions=128)
    assert targets(gpt2, "c_attn") == ["c_attn"]  # transposed layers have adapters, too


@pytest.mark.parametrize(
    "target", ["qproj", "proj", "lm_head", "self_attn", "embed_tokens", r".*lm_head", r"q_pro.?", ""]
)
def test_a_target_that_the_model_has_not_is_refused_with_those_that_it_has(target: str) -> None:
    """The head and the embedding, whole blocks, parts of names: none of them gets an adapter silently, or none."""
    names = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    with pytest.raises(UsageError) as error:
        targets(tiny_model(), "q_proj", target)
    assert str(error.value).startswith(f"train.lora_targets=[q_proj,{target}]: a LlamaForCausalLM has no linear layer")
    assert str(error.value).endswith(f"beside its head; it has {names}; or use [all-linear]")


def test_the_adapter_is_on_the_targets_alone(tmp_path: Path) -> None:
    config = configure("train.lora_targets=[q_proj,v_proj]")
    tokens, base = tokens_of(config), load_base(config)
    rows = tokens.train.rows
    parts: dict[str, Any] = {"model": base, "chat": tokens.chat, "output_dir": tmp_path}
    trainer = build_trainer(config, rows, plan_of(config, rows), **parts)
    adapted = {
        name.split(".lora_")[0].rpartition(".")[2] for name, p in trainer.model.named_parameters() if p.requires_grad
    }
    assert adapted == {"q_proj", "v_proj"}
    assert trainer.layout.way == "packed"


def test_the_sweep_and_its_plan_refuse_unknown_targets(tmp_path: Path, monkeypatch, capsys) -> None:
    for plan in ("true", "false"):
        typed = [
            "+method=dpo,simpo",
            "seed=1,2",
            "train.lora_targets=[query]",
            f"plan={plan}",
            f"results_dir={tmp_path}",
        ]
        monkeypatch.setattr(sys, "argv", ["harness.sweep", *typed])
        with pytest.raises(SystemExit) as stop:
            harness.sweep.__main__.main()
        assert stop.value.code == 2
        said = capsys.readouterr().err
        assert "train.lora_targets=[query]: a LlamaForCausalLM has no linear layer of the name query" in said
        assert not list(tmp_path.glob("*/study.yaml"))


# train.kernels: a stand-in for liger-kernel, whose kernels need a GPU and Triton.


def fake_liger(monkeypatch, change: Callable[[Tensor], Tensor]) -> list[dict[str, bool]]:
    """Install a module with Liger's table, which changes the last norm's output; return the calls of its function."""
    calls: list[dict[str, bool]] = []

    class LigerRMSNorm(torch.nn.Module):
        pass

    def apply_liger_kernel_to_llama(
        rope: bool = True,
        cross_entropy: bool = False,
        fused_linear_cross_entropy: bool = True,
        rms_norm: bool = True,
        swiglu: bool = True,
        model: Any = None,
    ) -> None:
        losses = {"cross_entropy": cross_entropy, "fused_linear_cross_entropy": fused_linear_cross_entropy}
        calls.append({"rope": rope, "rms_norm": rms_norm, "swiglu": swiglu, **losses})
        modeling_llama.LlamaRMSNorm = LigerRMSNorm  # as Liger does: for models that are made later
        own = model.model.norm.forward
        model.model.norm.forward = lambda states: change(own(states))

    module = types.ModuleType("liger_kernel.transformers.monkey_patch")
    module.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": apply_liger_kernel_to_llama}
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return calls


def slightly(states: Tensor) -> Tensor:
    """As another order of additions would change it."""
    return states * (1 + 1e-6)


def test_kernels_are_applied_to_the_loaded_model_alone_and_never_a_loss(monkeypatch) -> None:
    calls = fake_liger(monkeypatch, slightly)
    before = modeling_llama.LlamaRMSNorm
    model, other = tiny_model(), tiny_model()
    assert use_kernels(other, Kernels.none) is other
    assert use_kernels(model, Kernels.liger) is model
    chosen = {"rms_norm": True, "swiglu": True}
    assert calls == [{"rope": False, **chosen, "cross_entropy": False, "fused_linear_cross_entropy": False}]
    ids = torch.arange(1, 9)[None]
    assert not torch.equal(model(input_ids=ids).logits, other(input_ids=ids).logits)
    assert modeling_llama.LlamaRMSNorm is before
    assert torch.equal(tiny_model()(input_ids=ids).logits, other(input_ids=ids).logits)
    assert all(parameter.grad is None for parameter in model.parameters())


WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "values": lambda states: states * 1.01,
    "a gradient alone": lambda states: states.detach() + 1.01 * (states - states.detach()),
    "a number that is none": lambda states: states * torch.nan,
    "a gradient that is no number": lambda states: states.detach() + 0 * (states - states.detach()).sqrt(),
}


@pytest.mark.parametrize("name", WRONG)
def test_kernels_that_compute_something_else_are_refused(name: str, monkeypatch) -> None:
    fake_liger(monkeypatch, WRONG[name])
    with pytest.raises(UsageError, match=r"train\.kernels=liger: its kernels change logits or gradients of this Llama"):
        use_kernels(tiny_model(), Kernels.liger)


def test_a_class_without_kernels_is_refused(monkeypatch) -> None:
    fake_liger(monkeypatch, slightly)
    gpt2 = tiny_model(GPT2Config, GPT2LMHeadModel, n_embd=32, n_head=4, n_layer=2, n_positions=128)
    with pytest.raises(UsageError, match=r"train\.kernels=liger: liger-kernel has no kernels for a GPT2LMHeadModel"):
        use_kernels(gpt2, Kernels.liger)


def test_kernels_on_a_machine_without_a_gpu_are_refused(monkeypatch) -> None:
    monkeypatch.setattr("harness.train.stage.find_spec", lambda name: object())
    asked: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: asked.append("torch"))
    with pytest.raises(UsageError, match=r"train\.kernels=liger: its kernels need a GPU, and this machine has none"):
        configure("train.kernels=liger")
    assert not asked, "the first question settles which GPUs a process sees, before a trial has taken one of several"


def test_a_base_with_other_kernels_is_another_base() -> None:
    config = configure()
    keys = {BaseKey(Path("a"), False, config.train.tuning, kernels) for kernels in Kernels}
    assert len(keys) == len(Kernels)
    assert config.train.optimizer is Optimizer.auto


@pytest.mark.parametrize(
    ("keys", "has_kernels", "expected"),
    [([], True, "bf16"), ([], False, "tf32"), (["train.precision=fp32"], True, "tf32")],
)
def test_a_gpu_trains_in_bf16_where_it_has_kernels_for_it_and_else_in_tf32(
    keys: list[str], has_kernels: bool, expected: str, monkeypatch
) -> None:
    """Torch says that older cards support bf16, which they emulate; in bf16 no product is rounded to TF32."""
    monkeypatch.setattr(harness.train.base, "has_gpu", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_kernels or including_emulation
    )
    config = load_run(["+method=dpo", *keys])
    assert (uses_bf16(config), uses_tf32(config)) == (expected == "bf16", expected == "tf32")


def test_tf32_is_on_inside_the_block_alone() -> None:
    before = torch.get_float32_matmul_precision()
    with tf32(on=False):
        assert torch.get_float32_matmul_precision() == before
    with tf32(on=True):
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.backends.cuda.matmul.allow_tf32
    assert torch.get_float32_matmul_precision() == before
    assert not torch.backends.cuda.matmul.allow_tf32
