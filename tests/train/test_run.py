"""Training: both engines consume the same tokens and take the same steps; saved, resumed and stopped where it diverges."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from trl import DPOConfig, DPOTrainer

from harness.config.schema import Engine, RunConfig
from harness.data.plan import ConsumedTokens, expected_tokens_sha256
from harness.data.tokens import TokenPair
from harness.study.errors import DivergedError
from harness.sweep.problems import load_run
from harness.train.checkpoints import CONSUMED_FILE, last_checkpoint, seal_checkpoint
from harness.train.logps import pair_logps, reference_logps
from harness.train.losses import dpo_loss, simpo_loss
from harness.train.memory import plan_of
from harness.train.run import TrainResult, build_trainer, train_arm
from harness.train.trainers import CPOConfig, CPOTrainer
from tests.conftest import load_base, new_bases, splits_of, tokens_of, training_overrides


def configure(arm: str, *overrides: str) -> RunConfig:
    given = (f"+method={arm}", "data.max_train_pairs=24", "method.learning_rate=1e-3", *overrides)
    return load_run(training_overrides(*given))


def reference_of(config: RunConfig, cache: Path) -> torch.Tensor:
    tokens = tokens_of(config)
    return reference_logps(
        tokens.train,
        load_base(config),
        base_sha256="base",
        pad_id=tokens.chat.tokenizer.pad_token_id,
        cache=cache,
    )


def train(config: RunConfig, folder: Path, *, reference: torch.Tensor | None = None, **more):
    tokens = tokens_of(config)
    plan = plan_of(config, tokens.train.rows)
    folder.mkdir(parents=True, exist_ok=True)
    more = {"model": load_base(config), "chat": tokens.chat, "reference": reference} | more
    return train_arm(config, tokens.train.rows, plan, folder=folder, **more)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory):
    """Return a function that gives an arm's result and folder, trained once for all tests that change nothing of it."""
    runs: dict[str, tuple[TrainResult, Path]] = {}

    def train_once(arm: str) -> tuple[TrainResult, Path]:
        if arm not in runs:
            folder = tmp_path_factory.mktemp(arm)
            config = configure(arm)
            reference = None if arm == "simpo" else reference_of(config, folder / "cache")
            runs[arm] = train(config, folder, reference=reference), folder
        return runs[arm]

    return train_once


@pytest.mark.slow
def test_each_step_of_a_trained_model_equals_the_stock_trainers(tmp_path: Path) -> None:
    """Length-normalised DPO; the other arms: `test_packed_engine.py`; adapters of all arms: the next test."""
    config = configure("dpo_norm", "train.tuning=full", "method.learning_rate=1e-4")
    paired = train(config, tmp_path / "paired", reference=reference_of(config, tmp_path / "cache"))
    stock = train(replace(config, train=replace(config.train, engine=Engine.stock)), tmp_path / "stock")
    assert len(paired.steps) == len(stock.steps) == 6
    for ours, theirs in zip(paired.steps, stock.steps, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5, abs=1e-5)
    assert paired.consumed_tokens_sha256 == stock.consumed_tokens_sha256


# TRL's own trainers with nothing of the harness in them: classes, text and arguments as a user would write them.
BARE: dict[str, tuple[type, type, dict]] = {
    "dpo": (DPOTrainer, DPOConfig, {"beta": 0.1}),
    "dpo_norm": (DPOTrainer, DPOConfig, {"beta": 5.0, "loss_type": ["sigmoid_norm"]}),
    "simpo": (CPOTrainer, CPOConfig, {"beta": 2.0, "loss_type": "simpo", "simpo_gamma": 1.0, "cpo_alpha": 0.0}),
}


def train_bare(arm: str, config: RunConfig, folder: Path) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """Train on the plan's pairs as text, in its order, and return each step's log and the adapter.

    The text is what makes this possible: with the embedded study's template, which writes one end of turn and nothing
    behind it, TRL makes the same ids of it as the harness, which is checked first. (With ChatML it would not, see
    `test_stock_cpotrainer_on_raw_text_does_not_see_the_same_tokens`.)
    """
    trainer_class, config_class, arguments = BARE[arm]
    pairs = splits_of(config).train
    rows = tokens_of(config).train.rows
    assert [pair.pair_id for pair in pairs] == [row.pair_id for row in rows]
    order = plan_of(config, rows).order
    text = [{side: [*getattr(pairs[i], side)] for side in ("prompt", "chosen", "rejected")} for i in order]
    trainer = trainer_class(
        model=load_base(config),
        args=config_class(
            output_dir=str(folder),
            num_train_epochs=1,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=1e-4,
            lr_scheduler_type="cosine",
            warmup_steps=1,
            max_grad_norm=1.0,
            optim="adamw_torch",  # the default is the fused kernel, which rounds otherwise (5e-7 in the loss)
            train_sampling_strategy="sequential",
            disable_dropout=True,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            seed=config.seed,
            **arguments,
        ),
        train_dataset=Dataset.from_list(text),
        processing_class=copy.deepcopy(tokens_of(config).chat.tokenizer),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    assert [ids_in(row) for row in trainer.train_dataset] == [
        (list(rows[i].prompt_ids), list(rows[i].chosen_ids), list(rows[i].rejected_ids)) for i in order
    ]
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry], adapter_of(trainer.model)


def ids_in(row: dict) -> tuple[list[int], list[int], list[int]]:
    """Return the ids of prompt, chosen and rejected in a row that DPOTrainer or CPOTrainer tokenised."""
    if "prompt_ids" in row:
        return row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]
    length = len(row["prompt_input_ids"])
    chosen, rejected = row["chosen_input_ids"], row["rejected_input_ids"]
    assert chosen[:length] == rejected[:length] == row["prompt_input_ids"]
    assert [label != -100 for label in row["chosen_labels"]] == [i >= length for i in range(len(chosen))]
    return chosen[:length], chosen[length:], rejected[length:]


def adapter_of(model: Any) -> dict[str, torch.Tensor]:
    """Return a copy of the LoRA weights, under the names that the saved file has."""
    weights = {name: p for name, p in model.named_parameters() if "lora_" in name}
    return {name.replace(".default.", "."): p.detach().clone() for name, p in weights.items()}


# The greatest differences that are allowed, in each step's loss and gradient norm and in the weights at the end.
# None (0.0) where both sides compute the same; the paired engine sums in another order.
ALLOWED = {Engine.paired: 1e-5, Engine.stock: 0.0}


@pytest.mark.parametrize("arm", BARE)
def test_both_engines_take_the_steps_of_trls_bare_trainer_on_text(arm: str, tmp_path: Path) -> None:
    base = configure(arm, "method.learning_rate=1e-4")
    bare_steps, bare_adapter = train_bare(arm, base, tmp_path / "bare")
    reference = None if arm == "simpo" else reference_of(base, tmp_path / "cache")
    for engine in Engine:
        config = replace(base, train=replace(base.train, engine=engine))
        folder = tmp_path / engine.value
        ours = train(config, folder, reference=reference if engine is Engine.paired else None)
        assert len(ours.steps) == len(bare_steps) == 6
        allowed = ALLOWED[engine]
        for key in ("loss", "grad_norm", "learning_rate"):
            steps = zip(ours.steps, bare_steps, strict=True)
            differences = [abs(a[key] - b[key]) / max(1.0, abs(b[key])) for a, b in steps]
            assert max(differences) <= allowed, f"{arm}, {engine.value}: {key} differs by {max(differences):.3g}"
        adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
        assert adapter.keys() == bare_adapter.keys()
        difference = max((adapter[name] - bare_adapter[name]).abs().max().item() for name in adapter)
        assert difference <= allowed, f"{arm}, {engine.value}: adapters differ by {difference:.3g}"


def initial_adapter(arm: str, engine: Engine, seed: int, folder: Path) -> dict[str, torch.Tensor]:
    config = configure(arm, f"train.engine={engine.value}", f"seed={seed}")
    rows = tokens_of(config).train.rows
    reference = torch.zeros(len(rows), 2) if engine is Engine.paired and arm != "simpo" else None
    torch.manual_seed(len(arm))  # the process may have drawn anything before
    trainer = build_trainer(
        config,
        rows,
        plan_of(config, rows),
        model=load_base(config),
        chat=tokens_of(config).chat,
        output_dir=folder,
        reference=reference,
    )
    return adapter_of(trainer.model)


def test_every_arm_starts_from_the_same_adapter_and_another_seed_from_another(tmp_path: Path) -> None:
    starts = {
        (arm, engine.value): initial_adapter(arm, engine, 0, tmp_path)
        for arm, engine in itertools.product(("dpo", "simpo", "dpo_norm"), Engine)
    }
    first = starts["dpo", "paired"]
    assert len(first) == 2 * 7 * 4  # A and B of each linear layer but the head
    for case, adapter in starts.items():
        assert adapter.keys() == first.keys()
        for name, weights in adapter.items():
            assert torch.equal(weights, first[name]), f"{case}: {name}"
            assert ("lora_B" in name) == (not weights.any())
    other = initial_adapter("simpo", Engine.paired, 1, tmp_path)
    assert not any(torch.equal(other[name], first[name]) for name in first if "lora_A" in name)


def test_both_arms_consume_the_plan_and_nothing_else(trained) -> None:
    config = configure("dpo")
    rows = tokens_of(config).train.rows
    expected = expected_tokens_sha256(rows, plan_of(config, rows).order)
    assert {arm: trained(arm)[0].consumed_tokens_sha256 for arm in ("dpo", "simpo")} == {
        "dpo": expected,
        "simpo": expected,
    }


def test_another_seed_is_another_order() -> None:
    rows = tokens_of(configure("dpo")).train.rows
    plans = [plan_of(configure("dpo", f"seed={seed}"), rows) for seed in (0, 1)]
    assert expected_tokens_sha256(rows, plans[0].order) != expected_tokens_sha256(rows, plans[1].order)


def test_dpo_starts_at_ln_2(trained) -> None:
    assert trained("dpo")[0].steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_the_first_simpo_step_is_the_papers_loss_on_that_batch(trained) -> None:
    config = configure("simpo")
    tokens = tokens_of(config)
    order = plan_of(config, tokens.train.rows).order[:4]
    batch = [tokens.train.rows[i] for i in order]
    sums = pair_logps(load_base(config), batch, pad_id=0, desc="oracle")
    lengths = torch.tensor([[len(row.chosen_ids), len(row.rejected_ids)] for row in batch])
    means = sums / lengths
    expected = simpo_loss(means[:, 0], means[:, 1], beta=2.0, gamma_beta_ratio=0.5).mean().item()
    assert trained("simpo")[0].steps[0]["loss"] == pytest.approx(expected, abs=1e-5)


def test_simpo_on_equal_answers_is_softplus_of_gamma(tmp_path: Path) -> None:
    """Equal answers have equal averages: each loss is log(1 + e^gamma), gamma = 2 * 0.5."""
    config = configure("simpo")
    tokens = tokens_of(config)
    rows = tuple(replace(row, rejected_ids=row.chosen_ids) for row in tokens.train.rows[:4])
    plan = plan_of(config, rows)
    result = train_arm(config, rows, plan, model=load_base(config), chat=tokens.chat, folder=tmp_path)
    assert result.steps[0]["loss"] == pytest.approx(math.log1p(math.exp(1.0)), abs=1e-5)


def test_length_norm_0_is_the_summed_log_prob(tmp_path: Path) -> None:
    config = configure("simpo", "method.length_norm=0", "method.beta=0.1", "method.gamma_beta_ratio=0")
    tokens = tokens_of(config)
    batch = [tokens.train.rows[i] for i in plan_of(config, tokens.train.rows).order[:4]]
    sums = pair_logps(load_base(config), batch, pad_id=0, desc="oracle")
    zero = torch.zeros(4, dtype=torch.float64)
    expected = dpo_loss(sums[:, 0], sums[:, 1], zero, zero, beta=0.1).mean().item()
    assert train(config, tmp_path).steps[0]["loss"] == pytest.approx(expected, abs=1e-5)


def test_the_saved_adapter_is_the_policy_that_was_trained(trained) -> None:
    config = configure("simpo")
    rows = tokens_of(config).train.rows
    before = pair_logps(load_base(config), rows, pad_id=0, desc="before")
    with new_bases().borrow_policy(config, trained("simpo")[1]) as policy:
        after = pair_logps(policy, rows, pad_id=0, desc="after")
    lengths = torch.tensor([[len(row.chosen_ids), len(row.rejected_ids)] for row in rows])
    margin = [((sums / lengths)[:, 0] - (sums / lengths)[:, 1]).mean().item() for sums in (before, after)]
    assert margin[1] > margin[0] + 0.05


def test_a_trial_resumes_from_its_checkpoint_as_if_nothing_had_happened(trained, tmp_path: Path) -> None:
    config = configure("simpo", "train.checkpoint_steps=2")
    whole = trained("simpo")[0]

    def die(step: int, logs: dict) -> None:
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "killed", on_step=die)
    found = last_checkpoint(tmp_path / "killed" / "checkpoints")
    assert found is not None
    assert found[0].name == "checkpoint-4"
    seen: list[int] = []
    resumed = train(config, tmp_path / "killed", on_step=lambda step, logs: seen.append(step))
    assert seen == [5, 6]
    assert resumed.consumed_tokens_sha256 == whole.consumed_tokens_sha256
    assert [s["loss"] for s in resumed.steps] == pytest.approx([s["loss"] for s in whole.steps], abs=1e-6)


def test_a_checkpoint_without_its_hash_is_not_resumed_from(tmp_path: Path) -> None:
    checkpoints(tmp_path)
    (tmp_path / "checkpoint-10" / CONSUMED_FILE).write_text('{"state": ')
    found = last_checkpoint(tmp_path)
    assert found is not None
    assert (found[0].name, found[1].num_pairs) == ("checkpoint-2", 8)
    assert last_checkpoint(tmp_path / "nothing") is None


def checkpoints(folder: Path) -> None:
    for step in (2, 10):
        (folder / f"checkpoint-{step}").mkdir()
        (folder / f"checkpoint-{step}" / "optimizer.pt").write_bytes(bytes(range(100)))
        seal_checkpoint(folder / f"checkpoint-{step}", ConsumedTokens("s", 4 * step))


def test_of_two_whole_checkpoints_the_newest_is_resumed_from(tmp_path: Path) -> None:
    checkpoints(tmp_path)
    found = last_checkpoint(tmp_path)
    assert found is not None
    assert (found[0].name, found[1].num_pairs) == ("checkpoint-10", 40)


@pytest.mark.parametrize("damaged", ["optimizer.pt", CONSUMED_FILE])
def test_a_checkpoint_of_which_a_file_was_changed_is_not_resumed_from(damaged: str, tmp_path: Path) -> None:
    checkpoints(tmp_path)
    path = tmp_path / "checkpoint-10" / damaged
    content = bytearray(path.read_bytes())
    content[content.index(b"4") if damaged == CONSUMED_FILE else 50] ^= 1  # "num_pairs": 40 becomes 50: still JSON
    path.write_bytes(bytes(content))
    found = last_checkpoint(tmp_path)
    assert found is not None
    assert found[0].name == "checkpoint-2"


def test_a_nan_stops_the_run(tmp_path: Path) -> None:
    config = configure("dpo")
    reference = torch.full((len(tokens_of(config).train.rows), 2), float("nan"), dtype=torch.float64)
    with pytest.raises(DivergedError, match=r"loss is nan at step 1 of 6"):
        train(config, tmp_path, reference=reference)


def test_stock_cpotrainer_on_raw_text_does_not_see_the_same_tokens(tmp_path: Path) -> None:
    """The reason for tokenising once: fed with text, TRL's CPOTrainer appends an EOS of its own to each answer."""
    config = configure("simpo")
    tokens = tokens_of(config)
    tokenizer = copy.deepcopy(tokens.chat.tokenizer)
    tokenizer.chat_template = tokenizer.chat_template.replace("'<|end|>'", "'<|end|> '")  # as ChatML's trailing newline
    messages = [{"role": "user", "content": "sort cab"}]
    text = {
        "prompt": messages,
        "chosen": [{"role": "assistant", "content": "abc"}],
        "rejected": [{"role": "assistant", "content": "cba"}],
    }
    trainer = CPOTrainer(
        model=load_base(config),
        args=CPOConfig(
            output_dir=str(tmp_path),
            loss_type="simpo",
            cpo_alpha=0.0,
            max_length=64,
            bf16=False,
            use_cpu=True,
            report_to=[],
        ),
        train_dataset=Dataset.from_list([text]),
        processing_class=tokenizer,
    )
    row = trainer.train_dataset[0]
    stock_answer = [i for i in row["chosen_labels"] if i != -100]
    prompt = tokens.chat.prompt_ids(messages, conversational=True)
    ours = tokens.chat.answer_ids(messages, text["chosen"], conversational=True)
    assert row["prompt_input_ids"] == prompt
    assert ours.count(tokenizer.eos_token_id) == 1
    assert stock_answer.count(tokenizer.eos_token_id) == 2


def test_a_trainer_fed_in_another_order_arrives_at_another_hash(tmp_path: Path) -> None:
    config = configure("simpo")
    tokens = tokens_of(config)
    plan = plan_of(config, tokens.train.rows)
    shuffled = replace(plan, order=plan.order[::-1])
    trainer = build_trainer(
        config, tokens.train.rows, shuffled, model=load_base(config), chat=tokens.chat, output_dir=tmp_path
    )
    trainer.consumed = ConsumedTokens()
    trainer.train()
    assert trainer.consumed.num_pairs == len(plan.order)
    assert trainer.consumed.state != expected_tokens_sha256(tokens.train.rows, plan.order)


def test_log_probs_equal_one_sequence_at_a_time(tmp_path: Path) -> None:
    config = configure("dpo")
    rows = tokens_of(config).train.rows[:6]
    base = load_base(config).double()
    expected = [[_sum_logp(base, row, answer) for answer in (row.chosen_ids, row.rejected_ids)] for row in rows]
    ours = pair_logps(load_base(config), rows, pad_id=0, desc="batched")
    assert torch.allclose(ours, torch.tensor(expected, dtype=torch.float64), atol=1e-4)


def _sum_logp(model, row: TokenPair, answer: tuple[int, ...]) -> float:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*row.prompt_ids, *answer]])).logits[0, :-1]
    logps = logits.log_softmax(-1)[len(row.prompt_ids) - 1 :]
    return logps.gather(-1, torch.tensor(answer)[:, None]).sum().item()
