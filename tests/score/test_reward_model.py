"""Reward models: a real one, trained here with TRL, ranks held-out pairs and scores a study."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig, RewardTrainer

from harness.config.paths import embedded_dir as study_dir
from harness.config.schema import RewardModelConfig
from harness.data.inputs import Inputs
from harness.score.reward_model import RewardModel
from harness.score.study_scores import rescore
from harness.study.errors import UsageError
from harness.study.files import read_jsonl
from harness.sweep.problems import load_run
from tests.score.test_judge import tidy
from tests.study_fixture import build_study

PAIRS = Inputs().splits(load_run(["+method=dpo"]))


def turns(pair: Any, side: str) -> tuple[list[dict], str]:
    return [dict(turn) for turn in pair.prompt], getattr(pair, side)[-1]["content"]


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model made of the embedded base and its training pairs."""
    folder = tmp_path_factory.mktemp("reward")
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(study_dir(), num_labels=1, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(study_dir())
    model.config.pad_token_id = tokenizer.pad_token_id
    rows = [
        {"prompt": list(pair.prompt), "chosen": list(pair.chosen), "rejected": list(pair.rejected)}
        for pair in PAIRS.train[:600]
    ]
    arguments = RewardConfig(
        output_dir=str(folder / "run"),
        per_device_train_batch_size=16,
        num_train_epochs=1,
        learning_rate=1e-3,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        logging_steps=1000,
        disable_tqdm=True,
        seed=0,
    )
    RewardTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    ).train()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder / "model"


def test_it_ranks_held_out_pairs_well_above_chance(reward_model: Path, tmp_path: Path) -> None:
    model = RewardModel(RewardModelConfig(path=str(reward_model), batch_size=64), tmp_path)
    pairs = PAIRS.dev_pairs[:300]
    chosen, rejected = (
        np.array(model.rewards([turns(pair, side) for pair in pairs])) for side in ("chosen", "rejected")
    )
    accuracy = (chosen > rejected).mean()
    assert accuracy > 0.65  # chance plus five standard errors


def test_rewards_are_those_of_the_model_on_one_row_without_padding(reward_model: Path, tmp_path: Path) -> None:
    pairs = PAIRS.dev_pairs[:7]
    found = RewardModel(RewardModelConfig(path=str(reward_model), batch_size=4), tmp_path).rewards(
        [turns(pair, "chosen") for pair in pairs]
    )
    model = AutoModelForSequenceClassification.from_pretrained(reward_model).eval()
    tokenizer = AutoTokenizer.from_pretrained(reward_model)
    model.config.pad_token_id = tokenizer.pad_token_id
    for pair, reward in zip(pairs, found, strict=True):
        text = tokenizer.apply_chat_template([*pair.prompt, *pair.chosen], tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        assert reward == pytest.approx(model(ids).logits.item(), abs=1e-4)


def test_what_was_computed_is_not_computed_again(reward_model: Path, tmp_path: Path, monkeypatch) -> None:
    config = RewardModelConfig(path=str(reward_model))
    texts = [turns(pair, "chosen") for pair in PAIRS.dev_pairs[:5]]
    first = RewardModel(config, tmp_path).rewards(texts)
    again = RewardModel(config, tmp_path)
    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", None)  # would fail if it was called
    assert again.rewards(texts) == first


def test_answers_that_are_too_long_have_no_reward(reward_model: Path, tmp_path: Path) -> None:
    texts = [turns(pair, "chosen") for pair in PAIRS.dev_pairs[:2]]
    config = RewardModelConfig(path=str(reward_model), max_length=8)
    assert RewardModel(config, tmp_path).rewards(texts) == [None, None]


def test_a_study_is_scored_by_wins_against_the_base_with_the_raw_rewards_beside(reward_model, tmp_path) -> None:
    study = build_study(tmp_path / "results" / "letters", prompts=30)
    tidy(study)
    path, failed = rescore(study, ["reward_model", "length_controlled"], [f"score.reward_model.path={reward_model}"])
    assert failed == []
    scores = pd.read_csv(path)
    wins = scores[scores["scorer"] == "reward_model"]
    assert set(wins["score"]) <= {0.0, 0.5, 1.0}
    assert (wins[wins["arm"] == "sft"]["score"] == 0.5).all()
    for folder in (study / "trials").iterdir():
        rows = [row for row in read_jsonl(folder / "preferences.jsonl") if row["scorer"] == "reward_model"]
        assert len(rows) == 30
        for row in rows:
            own, other = row["details"]["reward"], row["details"]["baseline_reward"]
            assert row["preference"] == (0.5 if own == other else float(own > other))
    controlled = scores[(scores["scorer"] == "length_controlled_minimal") & (scores["arm"] != "sft")]
    assert controlled.groupby(["arm", "seed"]).size().eq(30).all()


def test_no_reward_model_is_named(reward_model: Path, tmp_path: Path) -> None:
    study = build_study(tmp_path / "results" / "letters", prompts=4)
    tidy(study)
    with pytest.raises(UsageError, match=r"score\.reward_model\.path=null: give"):
        rescore(study, ["reward_model"])
    with pytest.raises(UsageError, match="no such folder"):
        rescore(study, ["reward_model"], ["score.reward_model.path=./nowhere"])
    pickled = tmp_path / "pickled"
    shutil.copytree(reward_model, pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(UsageError, match="pickled weights are not loaded"):
        RewardModel(RewardModelConfig(path=str(pickled)), tmp_path)
    _, failed = rescore(study, ["reward_model"], [f"score.reward_model.path={study_dir()}"])
    assert len(failed) == 1
    assert "no reward model" in failed[0]
    assert "lacks score.weight" in failed[0]
