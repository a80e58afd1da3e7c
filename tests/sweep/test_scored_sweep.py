"""Sweeps that a judge decides and a benchmark guards: through the command, with the real components."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from harness.study.errors import UsageError
from harness.study.files import read_json, write_jsonl
from harness.sweep.app import print_result, run_sweep
from harness.sweep.protocol import StudyResult
from tests.score.test_lm_eval import settings as benchmark_settings
from tests.score.test_lm_eval import tasks
from tests.servers.judge import judge_server, prefers, texts

__all__ = ["tasks"]  # a fixture


def shorter(first: str, second: str) -> float:
    return len(second) - len(first)


def sweep(small: list[str], *more: str) -> StudyResult:
    (result,) = run_sweep(["+method=simpo,dpo", "study=s", *small, *more])
    return result


def judge(url: str) -> list[str]:
    return [f"score.judge.base_url={url}", "score.judge.model=fake-judge", "score.judge.max_retries=0"]


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["judge", "length_controlled"])
def test_a_judge_selects_on_dev_and_decides_on_golden(metric: str, small: list[str], tmp_path: Path, capsys) -> None:
    grid = ["arms.simpo.beta=2,10", "arms.dpo.beta=0.1,0.5", "seed=0,1", "tuning_seeds=[7]", f"decide.metric={metric}"]
    study = tmp_path / "results" / "s"
    with judge_server(prefers(shorter)) as server:
        result = sweep(small, *grid, *judge(server.url))
        assert print_result(result) == 0
        sent = len(server.requests)
        assert sent > 0
        again = sweep(small, *grid, *judge(server.url))
        assert (again.launched, len(server.requests)) == (0, sent)
    assert result.verdict is not None
    assert result.verdict["metric"] == metric
    scores = pd.read_csv(study / "scores.csv")
    rows = scores[scores["scorer"] == metric]
    dev, golden = (rows[(rows["split"] == split) & (rows["arm"] != "sft")] for split in ("dev", "golden"))
    assert (dev.groupby("arm")["config"].nunique() == 2).all()
    assert set(dev["seed"]) == {7}
    assert (golden.groupby("arm")["config"].nunique() == 1).all()
    assert set(golden["seed"]) == {0, 1}
    controlled = "length_controlled_minimal" if metric == "judge" else metric  # the registered name stays
    assert {name for name in scores["scorer"] if name.startswith("length")} == {controlled}
    report = (study / "report.html").read_text(encoding="utf-8")
    assert "The judge" in report
    assert "fake-judge, template alpacaeval" in report
    with pytest.raises(UsageError, match=r"score\.judge\.model: registered fake-judge, now other"):
        sweep(small, *grid, *judge("http://127.0.0.1:9/v1")[:1], "score.judge.model=other")


@pytest.mark.slow
def test_a_judge_that_is_down_gives_no_verdict_and_the_same_command_resumes(small, tmp_path, capsys) -> None:
    given = ["seed=0", "decide.metric=judge"]
    with judge_server(lambda request: (500, {}, {"error": {"message": "down"}})) as server:
        result = sweep(small, *given, *judge(server.url))
        assert print_result(result) == 1
        url = server.url
    said = capsys.readouterr().out
    assert "scorer failed: judge: " in said
    assert "no verdict: judge: " in said
    assert not (tmp_path / "results" / "s" / "verdict.json").exists()
    port = int(url.split(":")[2].split("/")[0])
    with judge_server(prefers(shorter), port=port):
        result = sweep(small, *given, *judge(url))
    assert print_result(result) == 0
    assert result.launched == 0


@pytest.mark.slow
def test_an_answer_that_is_the_same_for_every_prompt_loses_whatever_the_judge_says(
    small, tmp_path, monkeypatch
) -> None:
    """A null model: one text that the judge always prefers, given to all prompts by every SimPO policy."""
    import harness.generate.answers
    import harness.sweep.stages

    real = harness.generate.answers.generate_completions
    arms: list[str] = []
    run_trial = harness.sweep.stages.run_trial

    def noted(trial, context):
        arms.append(trial.arm)
        return run_trial(trial, context)

    def null_model(model, chat, prompts, *, split, decoding):
        from dataclasses import replace

        found = real(model, chat, prompts, split=split, decoding=decoding)
        return [replace(one, completion="Choose me!") for one in found] if arms[-1] == "simpo" else found

    monkeypatch.setattr("harness.sweep.launch.run_trial", noted)
    monkeypatch.setattr(harness.generate.answers, "generate_completions", null_model)
    golden = tmp_path / "golden.jsonl"
    write_jsonl(golden, [{"prompt": f"Sort the letters {chr(97 + i % 20)}c{chr(98 + i // 20)}a"} for i in range(40)])
    small = [line for line in small if not line.startswith("data.")]
    files = _embedded()
    data = [f"data.train={files}/train.jsonl", f"data.dev={files}/dev.jsonl", f"data.golden={golden}"]

    def gullible(request: dict) -> str:
        return "m" if "Choose me!" in texts(request)[1] else "M"

    with judge_server(gullible) as server:
        more = [*data, "data.max_train_pairs=8", "data.max_dev_prompts=4", "seed=0,1,2"]
        result = sweep(small, *more, "decide.metric=judge", *judge(server.url))
        assert not any("Choose me!" in str(request) for request in server.requests)
    assert result.verdict is not None
    assert result.verdict["means"]["simpo"] == 0.0
    assert result.verdict["verdict"] == "dpo"
    assert any("simpo seed 0 collapsed" in warning for warning in result.verdict["warnings"])


@pytest.mark.slow
def test_a_benchmark_guards_a_sweep_for_the_base_and_both_arms(small, tasks, tmp_path) -> None:
    guard = ["decide.guards=[{metric: lm_eval:mini, margin: 0.1}]", "seed=0"]
    result = sweep(small, *guard, *benchmark_settings(tasks))
    assert result.verdict is not None
    assert [one["metric"] for one in result.verdict["guards"]] == ["lm_eval:mini"]
    scores = pd.read_csv(tmp_path / "results" / "s" / "scores.csv")
    rows = scores[scores["scorer"] == "lm_eval:mini"]
    assert rows.groupby("arm").size().to_dict() == {"dpo": 40, "sft": 40, "simpo": 40}
    assert sweep(small, *guard, *benchmark_settings(tasks)).launched == 0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["decide.metric=judge"], "decide.metric=judge: judge is not set up; set score.judge.model"),
        (["decide.metric=length_controlled"], "set score.judge.model or score.reward_model.path"),
        (["decide.guards=[{metric: lm_eval:gsm8k, margin: 0.02}]"], "add gsm8k to score.lm_eval.tasks"),
        (["score.judge.model=x", "score.judge.api_key_env=NO_JUDGE_KEY"], "NO_JUDGE_KEY holds no key"),
        (
            ["score.judge.model=x", "score.judge.base_url=http://x", "score.max_cost_usd=1"],
            "cannot be kept without score.judge.input_price",
        ),
        (["score.judge.model=x", "score.judge.template=nope", "score.judge.base_url=y"], "no such template; allowed"),
        (["score.reward_model.path=./nowhere"], "no such folder; allowed: a folder or a Hub id"),
        (["score.scorers=[nowhere.py]"], "nowhere.py: no such file"),
        (["score.scorers=[nonsense]"], "score.scorers: nonsense: no such scorer"),
        (["score.lm_eval.tasks=[x]", "score.lm_eval.include_path=nowhere"], "include_path=nowhere: no such folder"),
        (["score.judge.concurrency=0"], "out of range; allowed: >= 1"),
        (["score.judge.modell=x"], "unknown key score.judge.modell"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_loaded(given, said, small, tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(UsageError) as caught:
        sweep(small, *given)
    assert said in str(caught.value)
    assert not (tmp_path / "results").exists()


def test_a_plan_says_what_the_judge_may_cost(small, tmp_path, capsys) -> None:
    prices = ["score.judge.input_price=3", "score.judge.output_price=15", "seed=0,1", "plan=true"]
    run_sweep(["+method=simpo,dpo", "study=s", *small, *judge("http://127.0.0.1:9/v1"), *prices])
    said = capsys.readouterr().out
    assert "judge fake-judge: at most 192 requests" in said  # 24 prompts x 2 arms x 2 seeds x both orders
    assert "at most about $" in said


def test_a_key_appears_in_no_file(small, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret-key")
    with judge_server(prefers(shorter)) as server:
        sweep(small, "seed=0", "decide.metric=judge", *judge(server.url))
    for path in (tmp_path / "results").rglob("*"):
        assert not path.is_file() or b"sk-very-secret-key" not in path.read_bytes(), path


def _embedded() -> Path:
    from harness.config.paths import embedded_dir as study_dir

    return study_dir()


@pytest.mark.slow
def test_prompts_alone_need_a_judge_or_a_scorer_of_ones_own(small, tmp_path) -> None:
    golden = tmp_path / "golden.jsonl"
    write_jsonl(golden, [{"instruction": f"Sort the letters {chr(97 + i)}cb", "dataset": "own"} for i in range(6)])
    small = [line for line in small if not line.startswith("data.")]
    data = [f"data.{split}={_embedded()}/{split}.jsonl" for split in ("train", "dev")] + [f"data.golden={golden}"]
    more = [*data, "data.max_train_pairs=8", "data.max_dev_prompts=4", "seed=0"]
    with pytest.raises(UsageError, match=r"set up a judge \(score\.judge\.model\)"):
        sweep(small, *more)
    with judge_server(prefers(shorter)) as server:
        result = sweep(small, *more, *judge(server.url))
    assert result.verdict is not None
    assert (result.verdict["metric"], result.verdict["n_prompts"]) == ("judge", 6)
    assert read_json(tmp_path / "results" / "s" / "judge.json")["comparisons"] == 18
