"""What does not fit is refused by number, with what would fit: before anything is loaded."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from harness.config.footprint import Load, ModelShape, footprint, memory_problem, shape_of, shape_of_folder
from harness.config.paths import embedded_dir
from harness.config.schema import AccelerateConfig, RunConfig, Tuning
from harness.study.errors import UsageError
from harness.sweep.app import run_sweep
from harness.sweep.problems import load_run
from tests.conftest import SMALL

PAIR = Load(2048, 1700)
H100 = 80 * 10**9


def llama(hidden: int, inner: int, heads: int, layers: int, **more: Any) -> ModelShape:
    """Return the shape of a Llama 3, from the names and shapes in its files."""
    config = {
        "hidden_size": hidden, "intermediate_size": inner, "num_attention_heads": heads, "num_key_value_heads": 8,
        "num_hidden_layers": layers, "vocab_size": 128256, **more,
    }  # fmt: skip
    key = 8 * hidden // heads
    matrices = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (key, hidden),
        "self_attn.v_proj": (key, hidden),
    }
    matrices |= {"self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden)}
    matrices |= {"mlp.down_proj": (hidden, inner), "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
    tensors = {f"model.layers.{i}.{name}.weight": shape for i in range(layers) for name, shape in matrices.items()}
    tensors |= {"model.embed_tokens.weight": (128256, hidden), "lm_head.weight": (128256, hidden)}
    return shape_of(config, tensors | {"model.norm.weight": (hidden,)})


EIGHT = llama(4096, 14336, 32, 32)
SEVENTY = llama(8192, 28672, 64, 80)


def trial(*overrides: str, **accelerate: Any) -> RunConfig:
    config = load_run(["+method=dpo", *overrides])
    config.model.path = "own"
    return replace(config, accelerate=AccelerateConfig(**accelerate)) if accelerate else config


def problem(config: RunConfig, shape: ModelShape, *, room: int = H100, bf16: bool = True, is_gpu: bool = True) -> str:
    return memory_problem(config, shape, PAIR, bf16=bf16, room=room, is_gpu=is_gpu)


def test_the_shape_of_an_8b_model() -> None:
    assert EIGHT.parameters == 8_030_261_248
    assert (EIGHT.query, EIGHT.key, EIGHT.normed, EIGHT.gated, EIGHT.matrices) == (4096, 1024, 8192, True, 224)
    assert 16 * EIGHT.sides == 41_943_040, "the adapter of rank 16 on all linear layers"


def test_tied_embeddings_count_once_and_a_part_with_text_gives_its_sizes() -> None:
    tied = llama(4096, 14336, 32, 32, tie_word_embeddings=True)
    assert EIGHT.parameters - tied.parameters == 128256 * 4096
    inside = shape_of({"text_config": {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 32, "n_layer": 3}}, {})
    assert (inside.hidden, inside.query, inside.layers, inside.inner, inside.gated) == (64, 128, 3, 256, False)


def test_of_a_mixture_of_experts_those_are_active_that_a_token_meets() -> None:
    config = {"hidden_size": 64, "num_attention_heads": 4, "num_experts": 8, "num_experts_per_tok": 2}
    config |= {"moe_intermediate_size": 48, "intermediate_size": 512, "num_hidden_layers": 1}
    found = shape_of(config, {"model.layers.0.mlp.experts.gate_up_proj": (8, 96, 64)})
    assert (found.inner, found.linear, found.sides, found.gated) == (96, 8 * 96 * 64, 8 * 160, True)


def test_full_fine_tuning_of_8b_on_80_gb_is_refused_by_number_with_what_fits() -> None:
    said = problem(trial("train.tuning=full"), EIGHT)
    assert said.startswith("train.tuning=full needs about 146 GB (weights 32, gradients 32, optimiser 64, "), said
    for words in ("weights in bf16 14", "to train own on one pair of 2,048 tokens", "this GPU has 80 GB"):
        assert words in said
    assert said.endswith(": use train.tuning=lora, or train.tuning=qlora, or accelerate=fsdp accelerate.num_processes=3 "
                         "(a GPU each)")  # fmt: skip


def test_an_adapter_on_8b_fits_80_gb_and_on_70b_only_where_the_base_is_in_4_bits() -> None:
    assert problem(trial("train.tuning=lora"), EIGHT) == ""
    said = problem(trial("train.tuning=lora"), SEVENTY)
    assert "train.tuning=lora needs about 14" in said
    assert said.endswith(": use train.tuning=qlora"), "and not FSDP: one GPU answers"
    assert "fsdp" in problem(trial("train.tuning=full"), EIGHT, room=141 * 10**9)
    config = trial()
    four_bits = replace(config, train=replace(config.train, tuning=Tuning.qlora))
    assert problem(four_bits, SEVENTY) == ""
    said = problem(four_bits, SEVENTY, room=24 * 10**9)
    assert said.endswith("no setting makes it fit: take a smaller model or a larger GPU")


def test_processes_that_share_the_weights_need_a_part_of_them_each() -> None:
    whole, shared = (
        footprint(config, EIGHT, PAIR, bf16=True, checkpointing=True)
        for config in (
            trial("train.tuning=full"),
            trial("train.tuning=full", num_processes=4, distributed_type="FSDP"),
        )
    )
    assert (shared.weights, shared.gradients) == (whole.weights // 4, whole.gradients // 4)
    zero2 = trial(
        "train.tuning=full", num_processes=4, distributed_type="DEEPSPEED", deepspeed_config={"zero_stage": 2}
    )
    found = footprint(zero2, EIGHT, PAIR, bf16=True, checkpointing=True)
    assert (found.weights, found.optimiser) == (whole.weights, whole.optimiser // 4)
    said = problem(trial("train.tuning=lora", num_processes=4, distributed_type="FSDP"), SEVENTY)
    assert "it answers on one GPU, where its weights need 141 GB, and this GPU has 80 GB" in said
    assert problem(trial("train.tuning=full", num_processes=4, distributed_type="FSDP"), EIGHT) == ""
    said = problem(trial("train.tuning=full", num_processes=4, distributed_type="FSDP"), SEVENTY)
    assert said.endswith("use train.tuning=qlora"), "an adapter on 70B would train in four parts, and answer nowhere"


def test_settings_that_take_memory_are_named_where_doing_without_them_fits() -> None:
    slow = trial("train.tuning=lora", "train.gradient_checkpointing=false")
    room = footprint(slow, EIGHT, PAIR, bf16=True, checkpointing=False).total - 1
    assert "use train.gradient_checkpointing=true" in problem(slow, EIGHT, room=room)
    assert "use train.reference=cached" in problem(trial("train.reference=separate"), EIGHT, room=30 * 10**9)


def test_the_memory_of_a_machine_without_gpus_counts() -> None:
    said = problem(trial("train.tuning=lora"), EIGHT, room=24 * 10**9, bf16=False, is_gpu=False)
    assert "this machine has 24 GB: use train.tuning=qlora" in said
    assert problem(trial(), EIGHT, room=0) == "", "what is not known is not refused"


@pytest.mark.parametrize("plan", ["true", "false"])
def test_a_study_that_cannot_fit_is_refused_before_anything_is_written(plan: str, tmp_path, monkeypatch) -> None:
    memory = SimpleNamespace(total=10**7, available=10**7)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    given = [*SMALL, "+method=simpo,dpo", "seed=0", "study=s", f"results_dir={tmp_path / 'results'}", f"plan={plan}"]
    with pytest.raises(
        UsageError, match=r"train.tuning=full needs about .* this machine has 0.01 GB: use train.tuning=lora"
    ):
        run_sweep([*given, "train.tuning=full"])
    assert not (tmp_path / "results" / "s").exists()


def test_the_shape_is_read_from_the_headers_alone() -> None:
    from tests.conftest import load_base

    model = load_base(load_run(["+method=dpo"]))
    found = shape_of_folder(embedded_dir())
    assert found.parameters == sum(p.numel() for p in model.parameters())
    linear = [m for name, m in model.named_modules() if type(m).__name__ == "Linear" and "lm_head" not in name]
    assert found.linear == sum(m.weight.numel() for m in linear)
    assert found.sides == sum(m.in_features + m.out_features for m in linear)
