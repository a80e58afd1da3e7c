"""What a study proves before it trains, each with a planted fault that it finds, on the embedded study's own model."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from harness.config.arms import ARMS, MethodConfig, title
from harness.config.schema import Engine, RunConfig
from harness.study.errors import UsageError
from harness.study.files import read_json
from harness.sweep.problems import load_run
from harness.train.preconditions import prove, proved_once
from harness.train.prover import DETERMINISTIC, ENGINE, LOSS, Proof, sample_of
from tests.conftest import load_base, tiny_model, tokens_of, training_overrides


def configure(*overrides: str) -> RunConfig:
    return load_run(training_overrides("+method=dpo", "data.max_train_pairs=24", *overrides))


def proof_of(config: RunConfig, base: Any) -> Proof:
    tokens = tokens_of(config)
    return prove(config, tokens.train.rows, base, tokens.chat)


def details(proof: Proof) -> dict[str, tuple[str, str]]:
    return {finding.name: (finding.result, finding.detail) for finding in proof.findings}


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_the_embedded_model_is_proved_packed_and_comes_back_as_it_was(tuning: str) -> None:
    config = configure(f"train.tuning={tuning}")
    base = load_base(config)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    proof = proof_of(config, base)
    assert proof.layout.way == "packed"
    assert not proof.layout.still
    assert [result for result, _ in details(proof).values()] == ["proved"] * 4
    assert "0.693147 (log 2)" in details(proof)[LOSS][1]
    assert max(proof.gaps) < 1e-5
    assert before.keys() == base.state_dict().keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in base.state_dict().items())
    assert not [name for name, parameter in base.named_parameters() if parameter.grad is not None]


def test_the_pairs_of_the_proof_are_short_and_of_unlike_lengths() -> None:
    rows = tokens_of(configure()).train.rows
    long = tuple(replace(row, prompt_ids=row.prompt_ids * 40, chosen_ids=row.chosen_ids * 30) for row in rows)
    for sample in (sample_of(rows), sample_of(long), sample_of(rows[:1])):
        assert len({row.length for row in sample}) == len(sample)
        assert sum(row.length for row in sample) < 150


def ask(config: RunConfig, base: Any, folder: Path, *methods: MethodConfig) -> Proof:
    """Prove a model for a study in a folder, with some of its arms."""
    tokens = tokens_of(config)
    return proved_once(
        replace(config, results_dir=str(folder)),
        tokens.train.rows,
        tokens.chat,
        base_sha256="a",
        lend=lambda: contextlib.nullcontext(base),
        methods=methods,
    )


def arm(name: str, *overrides: str) -> MethodConfig:
    return load_run(training_overrides(f"+method={name}", *overrides)).method


WAYS = [("lora", "cached"), ("lora", "adapter_off"), ("lora", "separate"), ("full", "cached"), ("full", "separate")]
WAYS += [("qlora", way) for way in ("cached", "adapter_off", "separate")]


@pytest.mark.parametrize(("tuning", "reference"), WAYS)
@pytest.mark.parametrize("engine", ["paired", "stock"])
def test_dpos_loss_is_log_2_at_step_0_from_whatever_reference(
    engine: str, tuning: str, reference: str, tmp_path: Path
) -> None:
    if tuning == "qlora":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: 4-bit training is not tested")
    config = configure(f"train.engine={engine}", f"train.tuning={tuning}", f"train.reference={reference}")
    dpo, norm, simpo = arm("dpo", "method.beta=0.7"), arm("dpo_norm"), arm("simpo")
    proof = ask(config, load_base(config), tmp_path, dpo, norm, simpo)
    assert "0.693147 (log 2)" in details(proof)[LOSS][1]
    assert {details(proof)[f"the loss of {title(name)}"][0] for name in ("dpo", "dpo_norm", "simpo")} == {"proved"}
    for method in (dpo, norm):
        (path,) = (tmp_path / ".cache" / "preconditions").glob(f"*/{method.name}-*.json")
        losses = read_json(path)
        assert losses["first"] == pytest.approx(math.log(2), abs=1e-5)
        assert abs(losses["nudged"] - losses["first"]) > 1e-4, "policy and reference differ there"


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_reference_model_with_other_weights_is_found(tuning: str, tmp_path: Path, monkeypatch) -> None:
    import harness.train.run

    def load_another(config: RunConfig, folder: Path) -> Any:
        model = load_base(config)
        model.model.layers[0].mlp.down_proj.weight.data *= 1.5
        return model

    monkeypatch.setattr(harness.train.run, "load_base", load_another)
    config = configure("train.reference=separate", f"train.tuning={tuning}")
    with pytest.raises(UsageError, match=r"DPO's loss at step 0 is 0\.\d+ instead of 0\.693147"):
        ask(config, load_base(config), tmp_path)


OWN = {
    "dpo": ["method.beta=0.01"],
    "simpo": ["method.beta=10", "method.gamma_beta_ratio=0.3", "method.sft_weight=0.7", "method.length_norm=0.5"],
    "dpo_norm": ["method.beta=10"],
    "dpo_margin": ["method.gamma_beta_ratio=3"],
    "dpo_norm_margin": [],
    "simpo_no_margin": ["method.sft_weight=2"],
    "simpo_sum": [],
    "simpo_sum_no_margin": [],
}


def test_each_arm_is_proved_with_its_own_hyperparameters_and_a_known_one_costs_nothing(tmp_path: Path) -> None:
    assert OWN.keys() == {name for name, row in ARMS.items() if row.trainer}
    methods = [arm(name, *overrides) for name, overrides in OWN.items()]
    proof = ask(configure(), load_base(configure()), tmp_path, *methods)
    assert [details(proof)[f"the loss of {title(name)}"][0] for name in OWN] == ["proved"] * len(OWN)
    for method in methods:
        ask(configure(), None, tmp_path, replace(method, learning_rate=0.5))  # no base is needed
    ask(configure(), load_base(configure()), tmp_path, arm("simpo", "method.beta=3"))


def test_a_margin_that_does_not_reach_the_loss_is_found(tmp_path: Path, monkeypatch) -> None:
    import harness.train.run

    monkeypatch.setattr(harness.train.run, "with_margin", lambda reference, rows, config: reference)
    with pytest.raises(
        UsageError,
        match=r"method=dpo_margin \(beta=0\.1, gamma_beta_ratio=5\): a LlamaForCausalLM does not train with the loss "
        r"of DPO with margin alone: its loss at step 0 is 0\.693147 instead of 0\.974077; leave this arm out",
    ):
        ask(configure(), load_base(configure()), tmp_path, arm("dpo"), arm("dpo_margin"))


@pytest.mark.parametrize(
    ("name", "key", "settings"),
    [
        ("simpo", "beta", ["method.beta=2.5"]),
        ("simpo", "sft_weight", ["method.beta=2.5"]),
        ("simpo_sum", "length_norm", []),
        ("dpo_norm", "beta", []),
    ],
)
def test_a_hyperparameter_that_the_trainer_does_not_get_is_found(
    name: str, key: str, settings: list[str], tmp_path: Path, monkeypatch
) -> None:
    """The trainer is built with another value than the study has."""
    import harness.train.run

    given, other = arm(name, *settings), {"beta": 3.0, "sft_weight": 0.5, "length_norm": 1.0}[key]
    real = harness.train.run.build_trainer

    def build(config: RunConfig, *parts: Any, **more: Any) -> Any:
        if config.method == given:
            config = replace(config, method=replace(given, **{key: other}))
        return real(config, *parts, **more)

    monkeypatch.setattr(harness.train.run, "build_trainer", build)
    with pytest.raises(UsageError, match=rf"method={name} .*loss .* instead of "):
        ask(configure(), load_base(configure()), tmp_path, given)


def test_processes_that_share_weights_are_refused_where_answers_run_one_at_a_time(tmp_path: Path) -> None:
    base = load_base(configure())
    shifted_logits(base)
    ask(configure("accelerate=ddp", "train.micro_batch_size=1"), base, tmp_path)
    for kind, preset in (("FSDP", "fsdp"), ("DEEPSPEED", "zero3")):
        config = configure(f"accelerate={preset}", "train.micro_batch_size=1")
        with pytest.raises(
            UsageError, match=rf"accelerate.distributed_type={kind}: this model is run one answer at a time .* use acc"
        ):
            ask(config, base, tmp_path)


def noisy(module: torch.nn.Module, *, always: bool) -> None:
    """Plant noise: no number of the config and no module of a known class holds it."""
    module.register_forward_hook(
        lambda module, args, output: output + 0.01 * torch.rand_like(output) if always or module.training else output
    )


def test_noise_in_training_mode_is_found_and_all_arms_train_in_evaluation_mode() -> None:
    base = load_base(configure())
    noisy(base.model.layers[1].mlp, always=False)
    proof = proof_of(configure(), base)
    assert proof.layout.still
    assert "LlamaMLP (model.layers.1.mlp) draws random numbers" in details(proof)[DETERMINISTIC][1]
    assert details(proof)[LOSS][0] == "proved"


def test_noise_that_no_mode_switches_off_is_refused_by_name() -> None:
    base = load_base(configure())
    noisy(base.model.layers[0].self_attn.o_proj, always=True)
    with pytest.raises(
        UsageError, match=r"Linear \(model\.layers\.0\.self_attn\.o_proj\) gives other values at each call"
    ):
        proof_of(configure(), base)


def mean_of_all(output: torch.Tensor) -> torch.Tensor:
    return output.mean(1, keepdim=True)


def next_token(output: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(output, (0, 0, 0, 1))[:, 1:]


def last_of_block(output: torch.Tensor) -> torch.Tensor:
    """Give each token the last one of its four, as attention that is causal between blocks alone does."""
    positions = torch.arange(output.shape[1])
    return output[:, (positions // 4 * 4 + 3).clamp(max=output.shape[1] - 1)]


@pytest.mark.parametrize("strength", [0.1, 1e-6])
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("seen", [mean_of_all, next_token, last_of_block])
def test_a_model_whose_tokens_see_later_ones_is_refused_however_little(seen: Any, layer: int, strength: float) -> None:
    """As an encoder does that transformers loads as a language model (BERT without is_decoder)."""
    base = load_base(configure())
    base.model.layers[layer].mlp.register_forward_hook(lambda module, args, output: output + strength * seen(output))
    with pytest.raises(UsageError, match=r"LlamaForCausalLM lets tokens see later ones .* is_decoder: true"):
        proof_of(configure(), base)


@pytest.mark.parametrize("strength", [1e-3, 1e-6])
def test_a_look_ahead_is_refused_in_a_model_whose_rows_see_each_other_as_well(strength: float) -> None:
    """The noise that is allowed is not what other rows do to a row."""
    base = load_base(configure())
    base.model.layers[0].mlp.register_forward_hook(
        lambda module, args, output: output + strength * output.mean((0, 1), keepdim=True)
    )
    with pytest.raises(UsageError, match="lets tokens see later ones"):
        proof_of(configure(), base)


EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}


@pytest.mark.parametrize("seen", [None, mean_of_all])
def test_experts_that_compute_other_tokens_at_once_are_no_look_ahead(seen: Any) -> None:
    """A changed token goes to other experts, whose matrix products then have other shapes, and other noise."""
    config = configure()
    size = tokens_of(config).chat.tokenizer.vocab_size
    base = tiny_model(Qwen3MoeConfig, Qwen3MoeForCausalLM, vocab_size=size + 64, **EXPERTS)
    if seen is None:
        assert details(proof_of(config, base))[LOSS][0] == "proved"
        return
    base.model.layers[0].mlp.register_forward_hook(lambda module, args, output: output + 0.1 * seen(output))
    with pytest.raises(UsageError, match="lets tokens see later ones"):
        proof_of(config, base)


def shifted_logits(base: Any) -> None:
    """Plant a head that TRL's fused one does not know: logits are halved after the projection."""
    real = type(base).forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = real(base, *args, **kwargs)
        output.logits = output.logits / 2
        return output

    # A class of its own: a forward on the instance counts as a trainer's patch and is taken off.
    base.__class__ = type(
        "HalvedHead", (type(base),), {"forward": lambda self, *args, **kwargs: forward(*args, **kwargs)}
    )


def test_a_loss_that_is_not_the_equations_is_found_and_mended_by_running_rows_alone() -> None:
    base = load_base(configure())
    shifted_logits(base)
    proof = proof_of(configure(), base)
    assert proof.layout.way == "alone"
    assert "log-probs differ" in proof.layout.why
    result, detail = details(proof)[ENGINE]
    assert result == "alone"
    assert "DPO's loss with an adapter is" in detail


def test_trls_own_engine_with_another_loss_is_refused() -> None:
    config = configure("train.engine=stock")
    base = load_base(config)
    shifted_logits(base)
    with pytest.raises(UsageError, match=r"train\.engine=stock: .* use train\.engine=paired"):
        proof_of(config, base)


@pytest.mark.parametrize("strength", [0.5, 1e-4])
def test_tokens_that_mix_beside_the_attention_are_found_however_little(strength: float) -> None:
    """A token shift, as of state-space, convolution and RWKV layers."""
    base = load_base(configure())

    def shift(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output + strength * torch.nn.functional.pad(output, (0, 0, 1, 0))[:, :-1]

    base.model.layers[0].mlp.register_forward_hook(shift)
    proof = proof_of(configure(), base)
    assert proof.layout.way == "padded"
    assert "single rows" in proof.layout.why or "rows beside it" in proof.layout.why
    assert details(proof)[ENGINE][0] == "padded"
    assert proof.layout.why in details(proof)[ENGINE][1]


@pytest.mark.parametrize("factor", [1.5, -1.0, 1.01])
def test_a_gradient_that_differs_in_one_matrix_is_found(factor: float, monkeypatch) -> None:
    """Forward passes agree here; only going backward a layer of the paired engine is wrong, or has the wrong sign."""
    import harness.train.run

    def fuse_wrongly(model: Any) -> None:
        layer = model.model.layers[0].self_attn.q_proj
        layer.lora_B["default"].weight.register_hook(lambda gradient: gradient * factor)

    monkeypatch.setattr(harness.train.run, "fuse_adapters", fuse_wrongly)
    with pytest.raises(
        UsageError, match=r"gradient norm is|gradient differs from TRL's in model\.layers\.0\.self_attn\.q_proj\.lora_B"
    ):
        proof_of(configure(), load_base(configure()))


@pytest.mark.parametrize("engine", ["paired", "stock"])
@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_gradient_that_the_model_adds_to_that_of_the_loss_is_refused(engine: str, tuning: str) -> None:
    """As of routers whose loss enters going backward alone: no loss shows it, and every layout has it."""

    class Penalty(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, output: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(output)
            return output.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            return gradient + 1e-6 * ctx.saved_tensors[0]

    config = configure(f"train.engine={engine}", f"train.tuning={tuning}")
    base = load_base(config)
    base.model.layers[1].mlp.register_forward_hook(lambda module, args, output: Penalty.apply(output))
    with pytest.raises(UsageError, match=r"(?i)dpo.*gradient has a part that is not its loss's"):
        proof_of(config, base)


def test_a_second_study_of_the_same_model_pays_nothing(tmp_path: Path) -> None:
    config = replace(configure(), results_dir=str(tmp_path))
    tokens, lent = tokens_of(config), []

    @contextlib.contextmanager
    def lend() -> Iterator[Any]:
        lent.append(1)
        yield load_base(config)

    def prove_it(one: RunConfig, sha256: str = "a") -> Proof:
        return proved_once(one, tokens.train.rows, tokens.chat, base_sha256=sha256, lend=lend)

    first = prove_it(config)
    assert prove_it(replace(config, study="another", seed=7)).findings == first.findings
    assert len(lent) == 1
    prove_it(config, "b")
    prove_it(replace(config, train=replace(config.train, engine=Engine.stock)))
    assert len(lent) == 3
    (kept, *_) = sorted((tmp_path / ".cache" / "preconditions").glob("*/proof.json"))
    kept.write_text(kept.read_text().replace("proved", "\x00roved", 1))
    for _ in range(2):
        for one, sha256 in (
            (config, "a"),
            (config, "b"),
            (replace(config, train=replace(config.train, engine=Engine.stock)), "a"),
        ):
            prove_it(one, sha256)
    assert len(lent) == 4, "a damaged proof is made again, once"
