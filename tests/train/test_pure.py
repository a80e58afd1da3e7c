"""A loaded model is a function of one row's tokens alone: no noise, no loss of its own, positions of each row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BioGptConfig,
    BioGptForCausalLM,
    DbrxConfig,
    DbrxForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from harness.train.base import load_model
from harness.train.pure import switched_off
from tests.conftest import tiny_model

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [6.0, 4.0, 2.0, 1.5], "rope_theta": 1e4}


def loaded(folder: Path, config_class: Any = LlamaConfig, model_class: Any = LlamaForCausalLM, **more: Any) -> Any:
    tiny_model(config_class, model_class, **more).save_pretrained(folder)
    return load_model(folder, torch.float32)


NOISY = {
    "a number used in a function": (LlamaConfig, LlamaForCausalLM, {"attention_dropout": 0.4}, "attention_dropout=0.4"),
    "a module, and layers left out": (
        BioGptConfig,
        BioGptForCausalLM,
        {"hidden_dropout_prob": 0.3, "layerdrop": 0.5},
        "layerdrop=0.5",
    ),
    "a router's jitter, in a config inside of the config": (
        DbrxConfig,
        DbrxForCausalLM,
        {
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 2,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
            "ffn_config": {"moe_num_experts": 4, "moe_top_k": 2, "moe_jitter_eps": 0.2, "ffn_hidden_size": 32},
        },
        "ffn_config.moe_jitter_eps=0.2",
    ),
}


@pytest.mark.parametrize("kind", NOISY)
def test_training_mode_draws_no_random_number_wherever_it_is_declared(kind: str, tmp_path: Path) -> None:
    config_class, model_class, more, said = NOISY[kind]
    model = loaded(tmp_path, config_class, model_class, **more).train()
    ids = torch.arange(1, 21)[None]
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    assert said in switched_off(model)


def test_a_routers_loss_is_off_and_said(tmp_path: Path) -> None:
    model = loaded(tmp_path, Qwen3MoeConfig, Qwen3MoeForCausalLM, output_router_logits=True, **EXPERTS)
    assert not model.config.output_router_logits
    assert "output_router_logits=true" in switched_off(model)


LENGTHS = {
    "longrope": (
        Phi3Config,
        Phi3ForCausalLM,
        {"rope_parameters": LONG, "original_max_position_embeddings": 16, "pad_token_id": 0},
    ),
    "dynamic": (
        LlamaConfig,
        LlamaForCausalLM,
        {"rope_parameters": {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 1e4}, "max_position_embeddings": 12},
    ),
}


@pytest.mark.parametrize("kind", LENGTHS)
def test_positions_are_those_of_a_row_alone_whatever_stands_beside_it_or_came_before(kind: str, tmp_path: Path) -> None:
    config_class, model_class, more = LENGTHS[kind]
    model = loaded(tmp_path, config_class, model_class, **more).eval()
    short, long = torch.arange(5, 14), torch.arange(20, 60)
    batch = torch.zeros(2, len(long), dtype=torch.long)
    batch[0, : len(short)], batch[1] = short, long
    mask = (torch.arange(len(long)) < torch.tensor([[len(short)], [len(long)]])).long()
    with torch.no_grad():
        alone = [model(input_ids=row[None]).logits[0] for row in (short, long)]
        padded = model(input_ids=batch, attention_mask=mask).logits
        again = model(input_ids=short[None]).logits[0]
        plain = LlamaForCausalLM if model_class is LlamaForCausalLM else model_class
        unmended = plain.from_pretrained(tmp_path).eval()(input_ids=batch, attention_mask=mask).logits
    assert torch.allclose(padded[0, : len(short)], alone[0], atol=1e-5)
    assert torch.allclose(padded[1], alone[1], atol=1e-5)
    assert torch.equal(again, alone[0])
    assert not torch.allclose(unmended[0, : len(short)], alone[0], atol=1e-4)  # what transformers computes
