"""LoRA on layers that are no plain `nn.Linear`: experts, GPT-2's Conv1D, routers that return more than a tensor."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from harness.config.schema import RunConfig
from harness.study.errors import UsageError
from harness.sweep.problems import load_run
from harness.train.adapter import adapter_config, fuse_adapters
from harness.train.base import Bases, reset_model
from harness.train.memory import plan_of
from harness.train.preconditions import prove
from harness.train.run import build_trainer
from tests.conftest import load_base, tiny_model, tokens_of, training_overrides

IDS = torch.arange(1, 25)[None]
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
MIXTRAL = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
GPT2 = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 128}
LLAMA4 = {"num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 48, "head_dim": 8}
MODELS: dict[str, Any] = {
    "experts that are adapted": (MixtralConfig, MixtralForCausalLM, MIXTRAL),
    "experts": (Qwen2MoeConfig, Qwen2MoeForCausalLM, MOE),
    "Conv1D": (GPT2Config, GPT2LMHeadModel, GPT2),
    "a router with two outputs": (Llama4TextConfig, Llama4ForCausalLM, LLAMA4),
    "weights that run in kernels": (
        Mamba2Config,
        Mamba2ForCausalLM,
        {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    ),
    "plain": (LlamaConfig, LlamaForCausalLM, {}),
}


def configure() -> RunConfig:
    return load_run(training_overrides("+method=dpo", "train.lora_rank=4"))


def adapted(kind: str) -> tuple[Any, Any]:
    """Return a base and its policy, with an adapter that is not at its start."""
    config_class, model_class, more = MODELS[kind]
    base = tiny_model(config_class, model_class, **more)
    torch.manual_seed(0)
    policy = get_peft_model(base, adapter_config(configure(), base))
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return base, policy


@pytest.mark.parametrize("kind", MODELS)
def test_the_fused_adapter_computes_what_peft_computes(kind: str) -> None:
    found = []
    for fused in (False, True):
        base, policy = adapted(kind)
        if fused:
            fuse_adapters(base)
        logits = policy(input_ids=IDS).logits
        logits.log_softmax(-1)[..., 3].sum().backward()
        gradients = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
        found.append((logits, gradients))
    (logits, gradients), (ours, our_gradients) = found
    assert torch.allclose(logits, ours, atol=1e-5)
    assert gradients.keys() == our_gradients.keys()
    assert all(torch.allclose(gradients[name], our_gradients[name], atol=1e-4) for name in gradients)


@pytest.mark.parametrize("kind", MODELS)
def test_an_adapter_comes_off_and_leaves_the_base_as_it_was(kind: str) -> None:
    config_class, model_class, more = MODELS[kind]
    fresh = tiny_model(config_class, model_class, **more)
    base, policy = adapted(kind)
    fuse_adapters(base)
    policy(input_ids=IDS)
    reset_model(base)
    assert str(base) == str(fresh)
    assert torch.equal(base(input_ids=IDS).logits, fresh(input_ids=IDS).logits)


@pytest.mark.parametrize("kind", ["experts that are adapted", "experts", "Conv1D", "plain"])
def test_a_stored_policy_answers_as_the_trained_one_and_the_base_comes_back(kind: str, tmp_path: Path) -> None:
    config_class, model_class, more = MODELS[kind]
    tiny_model(config_class, model_class, **more).save_pretrained(tmp_path / "base")
    config = configure()
    config = replace(config, model=replace(config.model, path=str(tmp_path / "base")))
    _, policy = adapted(kind)
    policy.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = policy(input_ids=IDS).logits
        bases = Bases(lambda model, results: Path(model.path))
        with bases.borrow_base(config) as base:
            plain = base(input_ids=IDS).logits
        with bases.borrow_policy(config, tmp_path) as stored:
            assert torch.allclose(stored(input_ids=IDS).logits, expected, atol=1e-5)
        with bases.borrow_base(config) as base:
            assert torch.equal(base(input_ids=IDS).logits, plain)
    assert not torch.allclose(plain, expected, atol=1e-3)


class Scaled(torch.nn.Linear):
    """A linear layer that does more: it looks like `nn.Linear` to everything that asks by `isinstance`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 3.0 * super().forward(x)


def watched(layer: torch.nn.Linear) -> torch.nn.Linear:
    layer.register_forward_hook(lambda module, args, output: output * 2)
    return layer


def parametrised(layer: torch.nn.Linear) -> torch.nn.Linear:
    torch.nn.utils.parametrizations.weight_norm(layer)
    return layer


@pytest.mark.parametrize("change", [lambda layer: Scaled(32, 32, bias=False), watched, parametrised])
def test_a_layer_that_only_looks_like_a_linear_one_is_not_fused(change) -> None:
    base = tiny_model()
    attention = base.model.layers[0].self_attn
    attention.q_proj = change(attention.q_proj)
    names = ["q_proj", "k_proj"]
    policy = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=names, task_type="CAUSAL_LM"))
    before = policy(input_ids=IDS).logits
    assert fuse_adapters(base) == 3  # of the four layers
    assert torch.allclose(policy(input_ids=IDS).logits, before, atol=1e-5)


def test_an_adapters_dropout_is_on_in_both_arms_where_it_is_set_and_off_in_the_proof(tmp_path: Path) -> None:
    """TRL's trainers switch it off with the base's."""
    tokens = None
    for arm in ("dpo", "simpo"):
        config = load_run(training_overrides(f"+method={arm}", "data.max_train_pairs=8", "train.lora_dropout=0.25"))
        tokens = tokens_of(config)
        plan, base = plan_of(config, tokens.train.rows), load_base(config)
        trainer = build_trainer(config, tokens.train.rows, plan, model=base, chat=tokens.chat, output_dir=tmp_path)
        found = {m.p for name, m in trainer.model.named_modules() if name.endswith("lora_dropout.default")}
        assert found == {0.25}
        reset_model(base)
    said = {row.name: row.detail for row in prove(config, tokens.train.rows, load_base(config), tokens.chat).findings}
    assert "train.lora_dropout=0.25 is on in all arms" in said["training is deterministic"]


def test_dropout_on_experts_that_cannot_have_it_is_refused_by_name() -> None:
    config_class, model_class, more = MODELS["experts that are adapted"]
    config = load_run(training_overrides("+method=dpo", "train.lora_dropout=0.1"))
    with pytest.raises(UsageError, match=r"train\.lora_dropout=0\.1: .*; use train\.lora_dropout=0"):
        prove(
            config, tokens_of(config).train.rows, tiny_model(config_class, model_class, **more), tokens_of(config).chat
        )
