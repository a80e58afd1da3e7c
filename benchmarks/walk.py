"""Walk over transformers' architectures at tiny size: does each train alike in both arms, and in which layout?

`make walk` runs all of them and writes docs/architectures.md; `--only NAME ...` runs some and prints. Each class is
made with random weights, saved, loaded as a checkpoint is, and put through the preconditions of a study
(`harness.train.preconditions`): both arms, LoRA and full fine-tuning, TRL's own trainers and the paired engine, loss
and gradient norm on one batch. `--steps N` trains N steps with both engines instead, and prints the largest gaps.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from harness.config.schema import RunConfig
    from harness.data.inputs import Tokens
    from harness.train.prover import Proof

PAGE = Path(__file__).resolve().parents[1] / "docs" / "architectures.md"
TUNINGS = ("lora", "full")
SIX = ("llama", "gpt2", "mixtral", "bloom", "gemma2", "mamba")  # one of each kind: run by the tests
EIGHT = ("llama", "qwen3", "gpt_neox", "gpt2", "gemma2", "bloom", "mixtral", "phi3_longrope")  # for `--steps`

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "head_dim": 8,
}
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "num_local_experts": 4, "num_experts": 4}
_DEEPSEEK: dict[str, Any] = {
    **{"moe_intermediate_size": 16, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    **{"n_group": 1, "topk_group": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
    **{"qk_rope_head_dim": 8, "qk_head_dim": 16, "first_k_dense_replace": 1, "num_key_value_heads": 4},
}
_SSM: dict[str, Any] = {
    "mamba_d_state": 8,
    "mamba_d_head": 8,
    "mamba_n_heads": 8,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
}


@dataclass(frozen=True)
class Architecture:
    """A row of the walk.

    Attributes:
        kind: what is special about it.
        model_type: its name in transformers; the row's own name where that is empty.
        sizes: settings beside `SIZES`; None takes one of those away.
    """

    kind: str
    model_type: str = ""
    sizes: dict[str, Any] | None = None


def _a(kind: str, model_type: str = "", **sizes: Any) -> Architecture:
    return Architecture(kind, model_type, sizes)


ARCHITECTURES: dict[str, Architecture] = {
    "llama": _a("dense"),
    "mistral": _a("dense", sliding_window=None),
    "mistral_window": _a("sliding window", "mistral", sliding_window=16),
    "qwen2": _a("dense"),
    "qwen3": _a("dense"),
    "phi": _a("dense"),
    "phi3": _a("dense"),
    "phi3_longrope": _a(
        "positions by length",
        "phi3",
        original_max_position_embeddings=24,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 4,
            "long_factor": [8.0, 6.0, 4.0, 2.0],
            "original_max_position_embeddings": 24,
        },
    ),
    "llama_dynamic": _a(
        "positions by length",
        "llama",
        max_position_embeddings=16,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    ),
    "gemma": _a("dense"),
    "gemma2": _a("soft caps, sliding window", sliding_window=16, query_pre_attn_scalar=8, attention_dropout=0.1),
    "gemma3_text": _a("text part of a multimodal model", sliding_window=16, query_pre_attn_scalar=8),
    "granite": _a("dense", logits_scaling=2.0, residual_multiplier=0.5, attention_multiplier=0.2),
    "cohere": _a("dense"),
    "cohere2": _a("sliding window", sliding_window=64),
    "olmo": _a("dense"),
    "olmo2": _a("dense"),
    "olmo3": _a("sliding window", sliding_window=64),
    "smollm3": _a("dense"),
    "starcoder2": _a("dense"),
    "stablelm": _a("dense"),
    "gpt_neox": _a("dense", num_key_value_heads=None, hidden_dropout=0.1),
    "gptj": _a("dense", rotary_dim=4, num_key_value_heads=None, resid_pdrop=0.1),
    "codegen": _a("dense", rotary_dim=4, num_key_value_heads=None),
    "gpt_neo": _a("local attention", attention_types=[[["global", "local"], 1]], window_size=16, num_layers=2),
    "gpt2": _a("Conv1D, absolute positions", n_positions=256, n_embd=32, n_layer=2, n_head=4),
    "gpt_bigcode": _a("absolute positions", n_positions=256, n_embd=32, n_layer=2, n_head=4),
    "opt": _a("absolute positions", ffn_dim=48, word_embed_proj_dim=32, dropout=0.1),
    "xglm": _a("absolute positions", d_model=32, ffn_dim=48, num_layers=2, attention_heads=4, layerdrop=0.1),
    "biogpt": _a("absolute positions", hidden_dropout_prob=0.1),
    "bloom": _a("ALiBi", n_layer=2, n_head=4),
    "falcon": _a("dense", head_dim=None, num_kv_heads=2, new_decoder_architecture=True),
    "falcon_alibi": _a("ALiBi", "falcon", head_dim=None, alibi=True, new_decoder_architecture=False),
    "mpt": _a("ALiBi", d_model=32, n_heads=4, n_layers=2, max_seq_len=256, expansion_ratio=2),
    "persimmon": _a("dense", num_key_value_heads=None),
    "nemotron": _a("dense"),
    "glm": _a("dense"),
    "glm4": _a("dense"),
    "helium": _a("dense"),
    "exaone4": _a("dense", sliding_window=64),
    "ernie4_5": _a("dense"),
    "hunyuan_v1_dense": _a("dense"),
    "seed_oss": _a("dense"),
    "arcee": _a("dense"),
    "apertus": _a("dense"),
    "diffllama": _a("differential attention"),
    "vaultgemma": _a("soft caps", sliding_window=64, query_pre_attn_scalar=8),
    "mixtral": _a("mixture of experts", router_jitter_noise=0.1, **_EXPERTS),
    "qwen2_moe": _a("mixture of experts", moe_intermediate_size=16, shared_expert_intermediate_size=16, **_EXPERTS),
    "qwen3_moe": _a("mixture of experts", moe_intermediate_size=16, router_aux_loss_coef=0.5, **_EXPERTS),
    "olmoe": _a("mixture of experts", **_EXPERTS),
    "gpt_oss": _a("mixture of experts, sinks", sliding_window=64, router_aux_loss_coef=0.9, **_EXPERTS),
    "phimoe": _a("mixture of experts", router_jitter_noise=0.01, input_jitter_noise=0.01, **_EXPERTS),
    "granitemoe": _a("mixture of experts", **_EXPERTS),
    "deepseek_v2": _a("mixture of experts, latent attention", **_DEEPSEEK),
    "deepseek_v3": _a("mixture of experts, latent attention", **_DEEPSEEK),
    "ernie4_5_moe": _a("mixture of experts", moe_num_experts=4, moe_k=2, moe_intermediate_size=16),
    "glm4_moe": _a("mixture of experts", **{**_DEEPSEEK, "num_key_value_heads": 2}),
    "llama4_text": _a(
        "mixture of experts, chunked attention",
        intermediate_size_mlp=48,
        num_local_experts=2,
        num_experts_per_tok=1,
        attention_chunk_size=16,
    ),
    "mamba": _a("state space", state_size=8, num_attention_heads=None, num_key_value_heads=None),
    "mamba2": _a("state space", state_size=8, num_heads=8, n_groups=1, expand=2, chunk_size=8),
    "falcon_mamba": _a("state space", state_size=8, num_attention_heads=None, num_key_value_heads=None),
    "rwkv": _a("recurrent, token shift", attention_hidden_size=32, context_length=256),
    "recurrent_gemma": _a("recurrent and attention", lru_width=32, attention_window_size=16, num_hidden_layers=3),
    "xlstm": _a("recurrent", num_heads=4, num_blocks=2, embedding_dim=32, chunk_size=16),
    "jamba": _a(
        "hybrid, mixture of experts",
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_d_state=8,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
        **_EXPERTS,
    ),
    "bamba": _a("hybrid", attn_layer_indices=[1], **_SSM),
    "falcon_h1": _a("hybrid", mamba_d_ssm=64, **_SSM),
    "granitemoehybrid": _a(
        "hybrid, mixture of experts",
        layer_types=["mamba", "attention"],
        shared_intermediate_size=16,
        **_SSM,
        **_EXPERTS,
    ),
    "lfm2": _a("hybrid of convolutions", layer_types=["conv", "full_attention"], block_ff_dim=48),
    "qwen3_next": _a(
        "hybrid, mixture of experts",
        layer_types=["linear_attention", "full_attention"],
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        **_EXPERTS,
    ),
}


@dataclass(frozen=True)
class Row:
    """How one class came out with one tuning.

    Attributes:
        way: the layout; `refused`, `crashed` or `not made` where there is none.
        reason: why it is not packed, or what it was refused for.
        loss_gap, norm_gap: of the paired engine to TRL's own; the second one is relative.
    """

    name: str
    class_name: str
    tuning: str
    way: str
    reason: str = ""
    loss_gap: float = 0.0
    norm_gap: float = 0.0


def make(name: str, vocab_size: int) -> PreTrainedModel:
    """Make a class of the walk at tiny size with random weights, the same each time."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    row = ARCHITECTURES[name]
    sizes = SIZES | {"vocab_size": vocab_size, "pad_token_id": 0} | (row.sizes or {})
    config = AutoConfig.for_model(row.model_type or name, **{k: v for k, v in sizes.items() if v is not None})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def study_of(tuning: str, folder: Path) -> tuple[RunConfig, Tokens]:
    """Return a config with a folder as its model, and the embedded study's tokens."""
    from harness.data.inputs import Inputs
    from harness.sweep.problems import load_run

    arguments = ["+method=dpo", f"train.tuning={tuning}", "data.max_train_pairs=80", "tracking=none"]
    arguments += ["train.epochs=1", "train.batch_size=4", "train.micro_batch_size=2", "train.lora_rank=4"]
    config = load_run(arguments)
    return replace(config, model=replace(config.model, path=str(folder))), Inputs().tokens(config)


def walk_one(name: str, tuning: str) -> Row:
    """Put one class through the preconditions of a study."""
    import torch

    from harness.study.errors import UsageError
    from harness.train.base import load_model
    from harness.train.preconditions import prove

    class_name = ARCHITECTURES[name].model_type or name
    with tempfile.TemporaryDirectory() as folder:
        config, tokens = study_of(tuning, Path(folder))
        try:
            model = make(name, len(tokens.chat.tokenizer))
            class_name = type(model).__name__
            model.save_pretrained(folder)
        except Exception as error:
            return Row(name, class_name, tuning, "not made", f"{type(error).__name__}: {error}")
        try:
            model = load_model(Path(folder), torch.float32)
            proof: Proof = prove(config, tokens.train.rows, model, tokens.chat)
        except UsageError as error:
            return Row(name, class_name, tuning, "refused", str(error))
        except Exception as error:
            return Row(name, class_name, tuning, "crashed", f"{type(error).__name__}: {error}")
    return Row(name, class_name, tuning, proof.layout.way, proof.layout.why, *proof.gaps)


def train_both(name: str, tuning: str, steps: int) -> tuple[str, float, float]:
    """Train a class with both engines; return the layout and the largest gaps of loss and gradient norm (relative)."""
    import torch

    from harness.config.arms import ARMS
    from harness.config.schema import Engine
    from harness.train.base import load_model
    from harness.train.logps import pair_logps
    from harness.train.memory import plan_of
    from harness.train.preconditions import prove
    from harness.train.run import train_arm

    gaps = [0.0, 0.0]
    with tempfile.TemporaryDirectory() as folder:
        config, tokens = study_of(tuning, Path(folder))
        rows = tokens.train.rows[: 4 * steps]
        make(name, len(tokens.chat.tokenizer)).save_pretrained(folder)
        layout = prove(config, rows, load_model(Path(folder), torch.float32), tokens.chat).layout
        for arm in ("dpo", "simpo"):
            method = ARMS[arm].config(name=arm, learning_rate=1e-3 if tuning == "lora" else 1e-4)
            found = []
            for engine in (Engine.paired, Engine.stock):
                one = replace(config, method=method, train=replace(config.train, engine=engine, checkpoint_steps=100))
                model = load_model(Path(folder), torch.float32)
                given = None
                if engine is Engine.paired and arm == "dpo":
                    given = pair_logps(model, rows, pad_id=tokens.chat.tokenizer.pad_token_id, desc="", layout=layout)
                place = Path(folder) / f"{arm}-{engine.value}"
                place.mkdir()
                chosen = layout if engine is Engine.paired else replace(layout, way="padded")
                found.append(
                    train_arm(
                        one,
                        rows,
                        plan_of(one, rows),
                        model=model,
                        chat=tokens.chat,
                        folder=place,
                        reference=given,
                        layout=chosen,
                    ).steps
                )
            for ours, theirs in zip(*found, strict=True):
                gaps[0] = max(gaps[0], abs(ours["loss"] - theirs["loss"]))
                gaps[1] = max(gaps[1], abs(ours["grad_norm"] / theirs["grad_norm"] - 1))
    return layout.way, gaps[0], gaps[1]


def page_of(rows: Sequence[Row]) -> str:
    """Return docs/architectures.md."""
    from importlib.metadata import version

    names = list(dict.fromkeys(row.name for row in rows))
    by_name = {name: [row for row in rows if row.name == name] for name in names}
    ways = {name: {row.way for row in found} for name, found in by_name.items()}
    count = {way: sum(way in found for found in ways.values()) for way in ("packed", "padded", "alone", "refused")}
    versions = ", ".join(f"{name} {version(name)}" for name in ("transformers", "trl", "peft", "torch"))
    lines = [
        "# Architectures",
        "",
        "Written by `make walk`. Each class is made at tiny size with random weights and put through a study's",
        "preconditions: DPO and SimPO, LoRA and full fine-tuning, TRL's own trainers and the paired engine. A gap is",
        "the paired engine's to TRL's own on one batch in fp32: of the loss, and of the gradient norm (relative).",
        "",
        f"{len(names)} rows: {count['packed']} packed, {count['padded']} padded, {count['alone']} alone (one forward",
        f"pass for each answer), {count['refused']} refused. Versions: {versions}.",
        "",
        "| class | kind | LoRA | full | loss gap | norm gap | reason |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in by_name.items():
        way = {row.tuning: row.way for row in found}
        reason = re.sub(r"\s+", " ", "; ".join(dict.fromkeys(row.reason for row in found if row.reason)))
        reason = reason.replace("|", "\\|")[:300]
        worst = [max(getattr(row, gap) for row in found) for gap in ("loss_gap", "norm_gap")]
        label = f"{found[0].class_name}" + (f" ({name})" if ARCHITECTURES[name].model_type else "")
        lines.append(
            f"| {label} | {ARCHITECTURES[name].kind} | {way.get('lora', '')} | {way.get('full', '')} | {worst[0]:.1g} "
            f"| {worst[1]:.1g} | {reason} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Walk, and print or write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--only", nargs="+", choices=list(ARCHITECTURES), default=list(ARCHITECTURES))
    parser.add_argument("--steps", type=int, help="train so many steps with both engines, on eight classes")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    given = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.simplefilter("ignore")
    rows = []
    for name in EIGHT if given.steps and given.only == list(ARCHITECTURES) else given.only:
        for tuning in TUNINGS:
            said = io.StringIO()
            if given.steps:
                with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                    way, loss, norm = train_both(name, tuning, given.steps)
                print(f"{name:18} {tuning:5} {way:8} {loss:.2g} {norm:.2g}", flush=True)
                continue
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                row = walk_one(name, tuning)
            rows.append(row)
            print(
                f"{name:18} {tuning:5} {row.way:8} {row.loss_gap:.1g} {row.norm_gap:.1g} {row.reason[:700]}", flush=True
            )
    if given.write:
        PAGE.write_text(page_of(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
