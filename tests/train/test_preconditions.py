"""What a study proves before it trains, each with a planted fault that it finds, on the embedded study's own model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.config.schema import Engine, RunConfig
from harness.study.errors import UsageError
from harness.sweep.problems import load_run
from harness.train.preconditions import prove, proved_once
from harness.train.prover import DETERMINISTIC, ENGINE, LOSS, Proof, sample_of
from tests.conftest import load_base, tokens_of, training_overrides


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


def test_a_model_whose_tokens_see_later_ones_is_refused() -> None:
    """As an encoder does that transformers loads as a language model (BERT without is_decoder)."""
    base = load_base(configure())
    base.model.layers[0].mlp.register_forward_hook(lambda module, args, output: output + 0.1 * output.mean(1, True))
    with pytest.raises(UsageError, match=r"LlamaForCausalLM lets tokens see later ones .* is_decoder: true"):
        proof_of(configure(), base)


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

    def ask(one: RunConfig, sha256: str = "a") -> Proof:
        return proved_once(one, tokens.train.rows, tokens.chat, base_sha256=sha256, lend=lend)

    first = ask(config)
    assert ask(replace(config, study="another", seed=7)).findings == first.findings
    assert len(lent) == 1
    ask(config, "b")
    ask(replace(config, train=replace(config.train, engine=Engine.stock)))
    assert len(lent) == 3
    (kept, *_) = sorted((tmp_path / ".cache" / "preconditions").glob("*/proof.json"))
    kept.write_text(kept.read_text().replace("proved", "\x00roved", 1))
    for _ in range(2):
        for one, sha256 in (
            (config, "a"),
            (config, "b"),
            (replace(config, train=replace(config.train, engine=Engine.stock)), "a"),
        ):
            ask(one, sha256)
    assert len(lent) == 4, "a damaged proof is made again, once"
