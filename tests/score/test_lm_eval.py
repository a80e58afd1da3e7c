"""lm-evaluation-harness as a guard: a real task on the base and on both arms; a regression turns a win into a trade-off."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from harness.config.paths import embedded_dir as study_dir
from harness.config.schema import BenchmarkConfig
from harness.decide.rule import verdict
from harness.decide.scores_file import read_scores
from harness.score.lm_eval import benchmark_problem
from harness.score.study_scores import rescore
from harness.study.errors import UsageError
from harness.study.files import read_json, read_jsonl, write_jsonl
from harness.study.manifest import read_manifest, write_manifest
from harness.sweep.problems import load_run
from tests.conftest import splits_of
from tests.score.test_judge import tidy
from tests.study_fixture import build_study

DOCUMENTS = 40


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task of two choices: the answer that labellers preferred, and the same one backwards."""
    folder = tmp_path_factory.mktemp("tasks")
    pairs = splits_of(load_run(["+method=dpo"])).dev_pairs[:DOCUMENTS]
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


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A study that SimPO wins on its checks, whose SimPO policies are ruined."""
    folder = build_study(tmp_path / "results" / "letters", prompts=400)
    tidy(folder)
    config = {"model": {"path": "embedded", "revision": None, "chat_template": None}}
    (folder / "base" / "config.yaml").write_text(yaml.safe_dump(config))
    for trial in (folder / "trials").iterdir():
        write_adapter(trial, 2.0 if read_json(trial / "manifest.json")["arm"] == "simpo" else 0.0)
    return folder


def settings(tasks: Path) -> list[str]:
    return ["score.lm_eval.tasks=[mini]", f"score.lm_eval.include_path={tasks}", "score.lm_eval.batch_size=16"]


def test_a_planted_regression_turns_a_win_into_a_trade_off(study: Path, tasks: Path) -> None:
    guard = {"metric": "lm_eval:mini", "margin": 0.1}
    before = verdict(read_scores(study / "scores.csv"), metric="checks")
    assert before["verdict"] == "simpo"
    path, failed = rescore(study, ["lm_eval"], settings(tasks))
    assert failed == []
    scores = read_scores(path)
    rows = scores[scores["scorer"] == "lm_eval:mini"]
    assert set(rows["split"]) == {"golden"}
    means = rows.groupby("arm")["score"].mean()
    assert rows.groupby(["arm", "seed"]).size().eq(DOCUMENTS).all()
    assert means["dpo"] == means["sft"] > 0.9
    assert means["simpo"] < 0.8
    after = verdict(scores, metric="checks", guards=[guard])
    assert after["verdict"] == "trade-off"
    assert after["guards"][0]["passed"] is False


def test_what_was_run_is_not_run_again_and_a_changed_task_is(study: Path, tasks: Path) -> None:
    rescore(study, ["lm_eval"], settings(tasks))
    files = sorted(study.rglob("benchmarks.jsonl"))
    assert len(files) == 7
    times = [file.stat().st_mtime_ns for file in files]
    first = pd.read_csv(study / "scores.csv")
    rescore(study, ["lm_eval"], settings(tasks))
    assert [file.stat().st_mtime_ns for file in files] == times
    pd.testing.assert_frame_equal(first, pd.read_csv(study / "scores.csv"))
    trial = next(iter((study / "trials").iterdir()))
    write_adapter(trial, 0.5)
    rescore(study, ["lm_eval"], settings(tasks))
    changed = [file for file, time in zip(files, times, strict=True) if file.stat().st_mtime_ns != time]
    assert changed == [trial / "benchmarks.jsonl"]
    rescore(study, ["lm_eval"], [*settings(tasks), "score.lm_eval.limit=8"])
    assert all(len(list(read_jsonl(file))) == 8 for file in files)


def test_what_cannot_be_run_is_named(study: Path, tasks: Path) -> None:
    with pytest.raises(UsageError, match=r"score\.lm_eval\.tasks=\[\]: name the tasks"):
        rescore(study, ["lm_eval"])
    assert "no such folder" in str(benchmark_problem(BenchmarkConfig(tasks=["mini"], include_path="nowhere")))
    _, failed = rescore(study, ["lm_eval"], ["score.lm_eval.tasks=[nope]", f"score.lm_eval.include_path={tasks}"])
    assert len(failed) == 1
    assert "lm_eval: score.lm_eval.tasks=[nope]: lm-evaluation-harness failed" in failed[0]
    assert "nope" in failed[0].split("failed:")[1]
    _, failed = rescore(study, ["lm_eval"], [*settings(tasks), "score.lm_eval.metric=perplexity"])
    assert "score.lm_eval.metric=perplexity: not one of task mini's" in failed[0]


def test_a_run_that_scores_worst_is_not_run_and_gets_zero(study: Path, tasks: Path) -> None:
    trial = next(path for path in (study / "trials").iterdir() if read_json(path / "manifest.json")["arm"] == "dpo")
    manifest = read_manifest(trial)
    write_manifest(trial, manifest | {"flags": ["collapsed"]})
    path, _ = rescore(study, ["lm_eval"], settings(tasks))
    rows = pd.read_csv(path)
    mine = rows[(rows["scorer"] == "lm_eval:mini") & (rows["arm"] == "dpo") & (rows["seed"] == manifest["seed"])]
    assert len(mine) == DOCUMENTS
    assert (mine["score"] == 0).all()
    assert not (trial / "benchmarks.jsonl").exists()
