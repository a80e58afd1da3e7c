"""lm-evaluation-harness as a guard: a real task on the base and on both arms; a regression turns a win into a trade-off."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from harness.config.paths import embedded_dir as study_dir
from harness.config.schema import BenchmarkConfig
from harness.data.inputs import Inputs
from harness.decide.rule import verdict
from harness.decide.scores_file import read_scores
from harness.score.lm_eval import benchmark_problem
from harness.score.study_scores import rescore
from harness.study.errors import UsageError
from harness.study.files import read_json, read_jsonl, write_jsonl
from harness.study.manifest import read_manifest, write_manifest
from harness.sweep.problems import load_run
from tests.score.test_judge import tidy
from tests.study_fixture import build_study

DOCUMENTS = 40


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task of two choices: the answer that labellers preferred, and the same one backwards."""
    folder = tmp_path_factory.mktemp("tasks")
    pairs = Inputs().splits(load_run(["+method=dpo"])).dev_pairs[:DOCUMENTS]
    rows = [{"question": p.prompt[-1]["content"], "right": p.chosen[-1]["content"]} for p in pairs]
    rows = [row | {"wrong": row["right"][::-1]} for row in rows]
    write_jsonl(folder / "documents.jsonl", rows)
    task = {
        "task": "mini",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "documents.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{[right, wrong]}}",
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "mini.yaml").write_text(yaml.safe_dump(task))
    return folder


def write_adapter(folder: Path, scale: float) -> None:
    """Write a LoRA adapter that changes nothing (0) or that ruins the model."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(study_dir())
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.copy_(torch.randn_like(weight) * scale)
    model.save_pretrained(folder / "adapter")


def settings(tasks: Path) -> list[str]:
    return ["score.lm_eval.tasks=[mini]", f"score.lm_eval.include_path={tasks}", "score.lm_eval.batch_size=16"]


@pytest.fixture(scope="module")
def scored(tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that SimPO wins on its checks, whose SimPO policies are ruined; benchmarked once for all tests."""
    folder = build_study(tmp_path_factory.mktemp("results") / "letters", prompts=400)
    tidy(folder)
    config = {"model": {"path": "embedded", "revision": None, "chat_template": None}}
    (folder / "base" / "config.yaml").write_text(yaml.safe_dump(config))
    for trial in (folder / "trials").iterdir():
        write_adapter(trial, 2.0 if read_json(trial / "manifest.json")["arm"] == "simpo" else 0.0)
    assert verdict(read_scores(folder / "scores.csv"), metric="checks")["verdict"] == "simpo"
    _, failed = rescore(folder, ["lm_eval"], settings(tasks))
    assert failed == []
    return folder


@pytest.fixture
def study(scored: Path, tmp_path: Path) -> Path:
    """A copy of the benchmarked study."""
    shutil.copytree(scored, tmp_path / "letters")
    return tmp_path / "letters"


def test_a_planted_regression_turns_a_win_into_a_trade_off(scored: Path) -> None:
    scores = read_scores(scored / "scores.csv")
    rows = scores[scores["scorer"] == "lm_eval:mini"]
    assert set(rows["split"]) == {"golden"}
    means = rows.groupby("arm")["score"].mean()
    assert rows.groupby(["arm", "seed"]).size().eq(DOCUMENTS).all()
    assert means["dpo"] == means["sft"] > 0.9
    assert means["simpo"] < 0.8
    after = verdict(scores, metric="checks", guards=[{"metric": "lm_eval:mini", "margin": 0.1}])
    assert after["verdict"] == "trade-off"
    assert after["guards"][0]["passed"] is False


def test_only_changed_weights_and_tasks_run_again_and_a_run_that_scores_worst_gets_zero(
    study: Path, tasks: Path
) -> None:
    files = sorted(study.rglob("benchmarks.jsonl"))
    assert len(files) == 7
    times = [file.stat().st_mtime_ns for file in files]
    first = pd.read_csv(study / "scores.csv")
    rescore(study, ["lm_eval"], settings(tasks))
    assert [file.stat().st_mtime_ns for file in files] == times
    pd.testing.assert_frame_equal(first, pd.read_csv(study / "scores.csv"))
    trials = list((study / "trials").iterdir())
    write_adapter(trials[0], 0.5)
    rescore(study, ["lm_eval"], settings(tasks))
    changed = [file for file, time in zip(files, times, strict=True) if file.stat().st_mtime_ns != time]
    assert changed == [trials[0] / "benchmarks.jsonl"]

    worst = trials[1]
    manifest = read_manifest(worst)
    write_manifest(worst, {**manifest, "flags": ["collapsed"]})
    (worst / "benchmarks.jsonl").unlink()
    path, _ = rescore(study, ["lm_eval"], [*settings(tasks), "score.lm_eval.limit=8"])
    assert not (worst / "benchmarks.jsonl").exists()
    assert all(len(list(read_jsonl(file))) == 8 for file in files if file.parent != worst)
    rows = pd.read_csv(path)
    mine = rows[
        (rows["scorer"] == "lm_eval:mini") & (rows["arm"] == manifest["arm"]) & (rows["seed"] == manifest["seed"])
    ]
    assert len(mine) == 8
    assert (mine["score"] == 0).all()


def test_what_cannot_be_run_is_named(study: Path, tasks: Path) -> None:
    (study / "scoring.json").unlink()
    with pytest.raises(UsageError, match=r"score\.lm_eval\.tasks=\[\]: name the tasks"):
        rescore(study, ["lm_eval"])
    assert "no such folder" in str(benchmark_problem(BenchmarkConfig(tasks=["mini"], include_path="nowhere")))
    _, failed = rescore(study, ["lm_eval"], ["score.lm_eval.tasks=[nope]", f"score.lm_eval.include_path={tasks}"])
    assert len(failed) == 1
    assert "lm_eval: score.lm_eval.tasks=[nope]: lm-evaluation-harness failed" in failed[0]
    assert "nope" in failed[0].split("failed:")[1]
    perplexity = ["score.lm_eval.metric=perplexity", "score.lm_eval.limit=2"]
    _, failed = rescore(study, ["lm_eval"], [*settings(tasks), *perplexity])
    assert "score.lm_eval.metric=perplexity: not one of task mini's" in failed[0]
