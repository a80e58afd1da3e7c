"""The table of scorers: every row is complete, only the table compares names, and everyone else asks it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import harness
from harness.config.checkpoint import Checkpoints
from harness.config.keys import find_declared
from harness.config.schema import JudgeConfig, LengthControlConfig, RewardModelConfig, ScoreConfig
from harness.data.records import EvalPrompt
from harness.report.style import SCORERS as TITLES
from harness.score.judge import PlannedAnswer
from harness.score.scorers import (
    SCORERS,
    allowed_scorers,
    find_scorer,
    planned_costs,
    registered_settings,
    run_names,
    score_problems,
    study_scorers,
    unknown_scorer,
    with_sources,
)

PACKAGE = Path(harness.__file__).parent
NAMES = set(SCORERS) - {"checks"}  # also a column of golden sets
JUDGED = ScoreConfig(judge=JudgeConfig(model="m", base_url="http://x"))


@pytest.mark.parametrize("name", SCORERS)
def test_a_row_is_complete(name: str) -> None:
    row = SCORERS[name]
    assert (row.name, TITLES[name]) == (name, row.title)
    assert (row.score_trial is None) != (row.score_study is None)
    assert bool(row.setup) == (row.score_study is not None)
    assert all(source in SCORERS for source in row.sources)
    for key in row.keys:
        group = key in ("model", "score.judge", "score.reward_model", "score.length_control", "score.lm_eval")
        assert group or all(declared is not None for declared, *_ in find_declared(key, []))


def names_compared(path: Path) -> set[str]:
    """Return the scorers' names that a file compares, or looks for at the beginning of a text."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Compare):
            found += [node.left, *node.comparators]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("startswith", "endswith"):
            found += node.args
    found += [one for node in found if isinstance(node, ast.Tuple | ast.List | ast.Set) for one in node.elts]
    return {node.value for node in found if isinstance(node, ast.Constant) and node.value in NAMES}


def test_nobody_but_the_table_compares_a_scorers_name() -> None:
    files = [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "score" / "scorers.py"]
    assert {str(path): found for path in files if (found := names_compared(path))} == {}


def prompt(**fields: object) -> EvalPrompt:
    values = {"prompt_id": "p", "prompt": (), "checks": (), "cluster": None, "conversational": True, "row": 1}
    return EvalPrompt(**values | fields)  # type: ignore[arg-type]


def test_the_rows_of_a_split_and_the_config_say_what_it_can_be_scored_on_the_default_first() -> None:
    checked, plain = prompt(checks=({"max_words": 1},)), prompt()
    preferences = ["preference_accuracy", "preference_accuracy_sum", "preference_accuracy_mean"]
    for given, has_pairs, allowed in (
        ([plain], False, []),
        ([checked, plain], False, ["checks", "checks_fraction"]),
        ([checked], True, ["checks", "checks_fraction", *preferences]),
    ):
        for split in ("dev", "golden"):
            assert allowed_scorers(ScoreConfig(), given, has_pairs=has_pairs, split=split) == allowed
    more = ScoreConfig(judge=JudgeConfig(model="m"), scorers=["mine.py"])
    more.lm_eval.tasks = ["gsm8k"]
    wide = ["judge", "length_controlled_minimal", "lm_eval:gsm8k", "mine"]
    assert allowed_scorers(more, [plain], has_pairs=False, split="golden") == study_scorers(more) == wide
    assert allowed_scorers(more, [plain], has_pairs=False, split="dev") == [
        "judge",
        "length_controlled_minimal",
        "mine",
    ]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("judge", "judge is not set up; set score.judge.model"),
        ("length_controlled", "length_controlled is not set up; set score.judge.model or score.reward_model.path"),
        ("lm_eval:gsm8k", "lm_eval:gsm8k is not set up; add gsm8k to score.lm_eval.tasks"),
        ("lm_eval", "no such scorer; scorers: checks, "),
        ("judge:x", "no such scorer; scorers: checks, "),
        ("vibes", "also judge, reward_model, length_controlled, lm_eval:TASK and files of your own"),
    ],
)
def test_a_scorer_that_is_not_set_up_says_what_to_set(name: str, said: str) -> None:
    assert said in unknown_scorer(name, ScoreConfig())


def test_a_scorer_runs_after_those_whose_preferences_it_reads() -> None:
    both = ScoreConfig(judge=JudgeConfig(model="m"), reward_model=RewardModelConfig(path="a/b"))
    assert with_sources(both, ["length_controlled"]) == ["judge", "reward_model", "length_controlled"]
    assert with_sources(JUDGED, ["length_controlled"]) == ["judge", "length_controlled"]
    assert with_sources(JUDGED, ["lm_eval"]) == ["lm_eval"]
    assert run_names(both) == ["judge", "reward_model", "length_controlled"]
    assert run_names(both, ["lm_eval:gsm8k", "lm_eval:arc", "checks"]) == ["lm_eval"]


def test_the_settings_of_what_decides_are_registered(tmp_path: Path) -> None:
    baseline = tmp_path / "given.jsonl"
    baseline.write_text("")
    score = ScoreConfig(
        judge=JudgeConfig(model="m", base_url="http://x"),
        length_control=LengthControlConfig(of="judge"),
        baseline=str(baseline),
    )
    found = registered_settings(score, ["length_controlled", "checks"], Checkpoints())
    assert list(found) == ["judge", "length_control", "baseline_sha256"]
    assert {"model", "base_url", "structured", "max_tokens", "temperature", "template_sha256"} == set(found["judge"])
    assert found["length_control"] == {"of": "judge", "difficulty": None, "gamed": None}
    assert registered_settings(ScoreConfig(), ["checks"], Checkpoints()) == {}


def test_a_plan_counts_dev_only_where_the_metric_is_judged() -> None:
    golden, dev = [PlannedAnswer([{"role": "user", "content": "q"}], times) for times in (6, 5)]
    for metric, requests in (("checks", 12), (None, 12), ("judge", 22), ("length_controlled", 22)):
        (line,) = planned_costs(JUDGED, metric, [golden], [dev], 10)
        assert line.startswith(f"judge m: at most {requests} requests")
    assert planned_costs(ScoreConfig(), "checks", [golden], [dev], 10) == []


def test_problems_are_those_of_the_scorers_that_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    score = ScoreConfig(judge=JudgeConfig(model="m"), reward_model=RewardModelConfig(path="./nowhere"))
    (key,) = score_problems(score, ["judge"])
    assert "the environment variable OPENAI_API_KEY holds no key" in key
    assert ["no such folder" in text for text in score_problems(score, ["reward_model"])] == [True]
    assert len(list(score_problems(score, ["judge", "reward_model", "length_controlled", "./nowhere.py"]))) == 3
    score.baseline = str(tmp_path / "gone")
    assert any(text == f"score.baseline={tmp_path / 'gone'}: no such file" for text in score_problems(score, []))


def test_a_file_is_a_scorer_with_a_row_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "brevity.py"
    path.write_text("def score(outputs): return []")
    row = find_scorer(str(path))
    assert row is not None
    assert row.name == "brevity"
    score = ScoreConfig(scorers=[str(path)])
    assert run_names(score, ["brevity"]) == [str(path)]
    assert list(registered_settings(score, ["brevity"], Checkpoints())) == ["brevity"]
    assert find_scorer("brevity") is None
