"""The paired engine against TRL's own: the same losses and gradient norms step by step, with and without each lever."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionInterface

import harness.train.logps
import harness.train.packed
import harness.train.trainers
from harness.config.schema import Engine, LeversConfig, Reference, RunConfig, Tuning
from harness.data.plan import ConsumedTokens
from harness.data.tokens import TokenPair
from harness.sweep.problems import load_run
from harness.train.adapter import fuse_adapters
from harness.train.attention import ATTENTION, Segments, attend_by, by_segment, call_of, packed_attention
from harness.train.logps import reference_logps
from harness.train.memory import plan_of
from harness.train.run import TrainResult, build_trainer, train_arm
from harness.train.trainers import HEAD_METRICS
from tests.conftest import load_base, new_bases, overriding, tokens_of, training_overrides

STEPS = 20
SHORT = "data.max_train_pairs=24"  # 6 steps
TOLERANCE = 1e-4  # relative, in fp32


def configure(arm: str, *overrides: str) -> RunConfig:
    defaults = [f"+method={arm}", "data.max_train_pairs=80", "method.learning_rate=2e-4"]
    return load_run(training_overrides(*overriding(defaults, *overrides)))


def multi_turn(rows: tuple[TokenPair, ...]) -> tuple[TokenPair, ...]:
    """Put the turns of an earlier pair before every second prompt: long prompts and short ones in one batch."""
    return tuple(
        replace(row, prompt_ids=(*earlier.prompt_ids, *earlier.chosen_ids, *row.prompt_ids)) if i % 2 else row
        for i, (earlier, row) in enumerate(zip(rows[-1:] + rows[:-1], rows, strict=True))
    )


def run(config: RunConfig, folder: Path, *, model: Any = None, rows: tuple[TokenPair, ...] = ()) -> TrainResult:
    tokens = tokens_of(config)
    rows = rows or tokens.train.rows
    model = model or load_base(config)
    reference = None
    if (
        config.train.engine is Engine.paired
        and config.train.reference is Reference.cached
        and config.method.name != "simpo"
    ):
        pairs = replace(tokens.train, rows=rows)
        reference = reference_logps(pairs, model, base_sha256="base", pad_id=0, cache=folder / "cache")
    folder.mkdir(parents=True, exist_ok=True)
    plan = plan_of(config, rows)
    return train_arm(config, rows, plan, model=model, chat=tokens.chat, folder=folder, reference=reference)


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory):
    """Return a function that trains a config with TRL's own engine, once for all levers that this engine lacks."""
    runs: dict[str, TrainResult] = {}

    def run_stock(config: RunConfig, rows: tuple[TokenPair, ...] = ()) -> TrainResult:
        train = config.train
        key = f"{config.method} {train.tuning} {train.micro_batch_size} {len(rows)}"
        if key not in runs:
            its = replace(config, train=replace(train, engine=Engine.stock, gradient_checkpointing=None))
            runs[key] = run(its, tmp_path_factory.mktemp("stock"), rows=rows)
        return runs[key]

    return run_stock


def compare(ours: TrainResult, stock: TrainResult, num_steps: int = STEPS) -> None:
    assert len(ours.steps) == len(stock.steps) == num_steps
    assert ours.consumed_tokens_sha256 == stock.consumed_tokens_sha256
    for key in ("loss", "grad_norm"):
        gaps = [abs(a[key] / b[key] - 1) for a, b in zip(ours.steps, stock.steps, strict=True)]
        assert max(gaps) <= TOLERANCE, f"{key} differs by {max(gaps):.2g} at step {gaps.index(max(gaps)) + 1}"


LEVERS = {
    "all": [],
    "reference online": ["train.reference=adapter_off"],
    "prompt twice": ["train.levers.share_prefix=false"],
    "head on all rows": ["train.levers.completion_head=false"],
    "TRL's forward pass": ["train.levers.share_prefix=false", "train.levers.completion_head=false"],
    "PEFT's own layers": ["train.levers.fuse_adapters=false"],
    "gradient checkpointing": ["train.gradient_checkpointing=true"],
    "no accumulation": ["train.micro_batch_size=4"],
    "full": ["train.tuning=full", "method.learning_rate=2e-5"],
    "full, head on all rows": ["train.tuning=full", "method.learning_rate=2e-5", "train.levers.completion_head=false"],
}


@pytest.mark.slow
@pytest.mark.parametrize("levers", LEVERS)
@pytest.mark.parametrize("arm", ["dpo", "simpo"])
def test_twenty_steps_equal_the_stock_trainers(arm: str, levers: str, stock, tmp_path: Path) -> None:
    """Multi-turn and single-turn prompts, answers of all lengths, an embedding that is also the head."""
    config = configure(arm, *LEVERS[levers])
    rows = multi_turn(tokens_of(config).train.rows)
    model = load_base(config)
    assert model.config.tie_word_embeddings
    compare(run(config, tmp_path, model=model, rows=rows), stock(config, rows))


def by_segments(module, query, key, value, mask, *, packed: Segments, scaling: float, **variants):
    """Attend in the layout of a GPU's one call for each layer, segment by segment."""
    rows = (states[0].transpose(0, 1) for states in (query, key, value))
    call = call_of(query, key, value, scaling, variants)
    return attend_by(by_segment, *rows, packed, call)[None], None


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["dpo", "simpo"])
def test_twenty_steps_by_segments_equal_the_stock_trainers(arm: str, stock, tmp_path: Path) -> None:
    config = configure(arm)
    rows = multi_turn(tokens_of(config).train.rows)
    AttentionInterface.register(ATTENTION, by_segments)
    try:
        ours = run(config, tmp_path, rows=rows)
    finally:
        AttentionInterface.register(ATTENTION, packed_attention)
    assert ours.packed
    compare(ours, stock(config, rows))


@pytest.mark.parametrize("arm", ["dpo", "simpo"])
def test_a_model_that_cannot_be_packed_is_trained_padded_and_says_so(
    arm: str, stock, tmp_path: Path, monkeypatch
) -> None:
    def refuse(*args, **kwargs):
        raise NotImplementedError("the model's attention has softcap")

    monkeypatch.setattr(harness.train.logps, "packed_logps", refuse)
    config = configure(arm, SHORT)
    ours = run(config, tmp_path / "ours")
    assert not ours.packed
    assert ours.why_padded == "NotImplementedError: the model's attention has softcap"
    compare(ours, stock(config), 6)


@pytest.mark.slow
def test_the_order_within_a_step_changes_no_gradient(tmp_path: Path) -> None:
    """Sorting a step's rows by length saves padding; the steps hold the same rows."""
    config = configure("simpo", "train.levers.group_lengths=false")
    config = configure("simpo", SHORT, "train.levers.group_lengths=false")
    rows = multi_turn(tokens_of(config).train.rows)
    grouped = replace(config, train=replace(config.train, levers=LeversConfig()))
    plain, sorted_ = plan_of(config, rows).order, plan_of(grouped, rows).order
    assert plain != sorted_
    assert all(set(plain[i : i + 4]) == set(sorted_[i : i + 4]) for i in range(0, len(plain), 4))
    a, b = run(config, tmp_path / "a", rows=rows), run(grouped, tmp_path / "b", rows=rows)
    for key in ("loss", "grad_norm"):
        assert [step[key] for step in a.steps] == pytest.approx([step[key] for step in b.steps], rel=TOLERANCE)


def counts(config: RunConfig, folder: Path, monkeypatch) -> dict[str, int]:
    """Count, over a training run, the model's calls, the tokens that it is given, and the rows through its head."""
    found = {"calls": 0, "tokens": 0, "head_rows": 0}
    model = load_base(config)
    real = harness.train.packed.token_logps

    def token_logps(model, hidden, targets, **more):
        found["head_rows"] += len(hidden)
        return real(model, hidden, targets, **more)

    def count(module, args, kwargs, output):
        found["calls"] += 1
        found["tokens"] += kwargs["input_ids"].numel()

    tokens = tokens_of(config)
    plan = plan_of(config, tokens.train.rows)
    reference = None
    if config.train.reference is Reference.cached and config.method.name != "simpo":
        reference = torch.zeros(len(tokens.train.rows), 2)
    parts: dict[str, Any] = {"model": model, "chat": tokens.chat, "reference": reference}
    trainer = build_trainer(config, tokens.train.rows, plan, output_dir=folder, **parts)
    for module in (harness.train.packed, harness.train.trainers):
        monkeypatch.setattr(module, "token_logps", token_logps)
    model.model.register_forward_hook(count, with_kwargs=True)
    trainer.consumed = ConsumedTokens()
    trainer.train()
    return found


def test_each_lever_is_really_active(tmp_path: Path, monkeypatch) -> None:
    """By counts, not by seconds: 24 pairs in 12 micro-batches."""
    config = configure("dpo", SHORT)
    rows = tokens_of(config).train.rows
    prompts = sum(len(row.prompt_ids) for row in rows)
    answers = sum(len(row.chosen_ids) + len(row.rejected_ids) for row in rows)
    fast = {"calls": 12, "tokens": prompts + answers - 2 * len(rows), "head_rows": answers}
    assert counts(config, tmp_path, monkeypatch) == fast
    assert counts(configure("simpo", SHORT), tmp_path, monkeypatch) == fast
    online = counts(configure("dpo", SHORT, "train.reference=adapter_off"), tmp_path, monkeypatch)
    assert online == {key: 2 * value for key, value in fast.items()}
    twice = counts(configure("dpo", SHORT, "train.levers.share_prefix=false"), tmp_path, monkeypatch)
    assert twice == fast | {"tokens": fast["tokens"] + prompts}
    everywhere = counts(configure("dpo", SHORT, "train.levers.completion_head=false"), tmp_path, monkeypatch)
    # Two answers start at one prompt's last row, which is asked for twice.
    assert everywhere == fast | {"head_rows": fast["tokens"] + len(rows)}


def test_the_heads_metrics_are_logged_at_some_steps_and_are_trls(stock, tmp_path: Path) -> None:
    for arm, names in (("dpo", set(HEAD_METRICS)), ("simpo", {"logits/chosen", "logits/rejected"})):
        config = configure(arm, SHORT, "train.levers.metrics_steps=2")
        steps = run(config, tmp_path / arm).steps
        has = [names <= set(step) for step in steps]
        assert has == [i % 2 == 0 for i in range(6)]
        assert all(not names & set(step) for step, whole in zip(steps, has, strict=True) if not whole)
        assert all("rewards/margins" in step for step in steps)
        if arm == "dpo":
            theirs = stock(config).steps
            for name in HEAD_METRICS:
                assert steps[2][name] == pytest.approx(theirs[2][name], rel=1e-3), name


def test_a_fused_adapter_computes_what_pefts_layers_compute() -> None:
    """Output and all gradients, in every layer that there is, with adapters that are not at their start."""
    from peft import LoraConfig, get_peft_model

    found = []
    for fused in (False, True):
        torch.manual_seed(0)
        config = LoraConfig(r=4, lora_alpha=12, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(load_base(configure("dpo")), config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        layers = sum(name.endswith("lora_A") for name, _ in model.named_modules())
        assert not fused or fuse_adapters(model) == layers
        logits = model(input_ids=torch.arange(30).view(2, 15) % 40).logits
        logits.log_softmax(-1)[..., 3].sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        with model.disable_adapter():
            found.append((logits, gradients, model(input_ids=torch.arange(15)[None] % 40).logits))
    (logits, gradients, plain), (fused_logits, fused_gradients, fused_plain) = found
    assert torch.allclose(logits, fused_logits, atol=1e-5)
    assert torch.allclose(plain, fused_plain, atol=1e-5)
    assert gradients.keys() == fused_gradients.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, fused_gradients[name], rtol=1e-4, atol=1e-4), name


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("tuning", [Tuning.lora, Tuning.full])  # qlora: tests/train/test_qlora.py
def test_a_base_comes_back_as_it_was_lent(tuning: Tuning, tmp_path: Path) -> None:
    """Bit for bit, after DPO and SimPO and generation; the same object, but where all of its weights were trained."""
    bases = new_bases()
    config = configure("simpo", SHORT, f"train.tuning={tuning.value}")
    with bases.borrow_base(config) as base:
        before, modules, attention = weights(base), str(base), base.config._attn_implementation
    for arm in ("dpo", "simpo"):
        trial = configure(arm, SHORT, f"train.tuning={tuning.value}")
        with bases.borrow_base(trial, trains_all=tuning is Tuning.full) as model:
            assert model is base
            run(trial, tmp_path / arm, model=model)
        with bases.borrow_policy(trial, tmp_path / arm) as policy:
            trained = weights(policy)
        assert any(not torch.equal(trained[name], before[name]) for name in before)
        with bases.borrow_base(config) as model:
            assert (model is base) == (tuning is Tuning.lora)
            base = model
            assert (str(model), model.config._attn_implementation) == (modules, attention)
            assert all(parameter.requires_grad for parameter in model.parameters())
            after = weights(model)
            assert after.keys() == before.keys()
            assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_second_trial_in_a_process_equals_one_in_a_fresh_process(tmp_path: Path) -> None:
    bases = new_bases()
    alone = run(configure("simpo", SHORT), tmp_path / "alone")
    for name, arm in (("first", "dpo"), ("second", "simpo")):
        with bases.borrow_base(configure(arm, SHORT)) as model:
            found = run(configure(arm, SHORT), tmp_path / name, model=model)
    assert [(s["loss"], s["grad_norm"]) for s in found.steps] == [(s["loss"], s["grad_norm"]) for s in alone.steps]


def test_a_base_is_not_lent_again_after_an_error_or_a_change() -> None:
    bases = new_bases()
    config = configure("simpo")
    with bases.borrow_base(config) as base:
        pass
    with contextlib.suppress(MemoryError), bases.borrow_base(config):
        raise MemoryError
    with bases.borrow_base(config) as model:
        assert model is not base
    with torch.no_grad(), bases.borrow_base(config) as broken:
        next(broken.parameters()).view(-1)[0] = float("nan")
    with bases.borrow_base(config) as model:
        assert model is not broken
    with torch.no_grad(), bases.borrow_base(config) as nudged:
        weight = list(nudged.parameters())[-1].view(-1)
        weight[-1] = torch.nextafter(weight[-1], torch.tensor(9.0))
    with bases.borrow_base(config) as model:
        assert model is not nudged
    with bases.borrow_base(configure("simpo", "train.levers.reuse_base=false")) as other:
        assert other is not model


def test_two_base_caches_share_nothing_and_hold_one_base_each() -> None:
    config, other = configure("simpo"), configure("simpo", "train.precision=bf16")
    first, second = new_bases(), new_bases()
    with first.borrow_base(config) as one, second.borrow_base(config) as two:
        assert one is not two
    with second.borrow_base(other) as whole:
        pass
    with second.borrow_base(config) as model:
        assert model is not two, "another kind of base was borrowed in between, and one is held at a time"
        assert model is not whole
    first.release()
    with first.borrow_base(config) as model:
        assert model is not one
