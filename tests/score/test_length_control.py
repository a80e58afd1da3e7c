"""Length-controlled win rates: against the definition, a second implementation, simulated truth and the bootstrap."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import optimize

from harness.config.schema import LengthControlConfig, ScoreConfig
from harness.decide.rule import verdict
from harness.decide.scores_file import checked
from harness.score.alpaca_files import Gamed
from harness.score.answers import Preference, Run, Scoring, Stored, write_preferences
from harness.score.length_control import GAMED_WEIGHT, control_runs, length_control_problems, length_controlled
from harness.score.scorers import find_scorer
from harness.study.errors import UsageError
from harness.study.files import read_json, read_jsonl, write_jsonl

PRIOR = 1e-3


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def drawn(seed: int, count: int = 400, constant: float = 0.3, slope: float = 0.9, shift: float = 0.0):
    """Preferences that follow the model, with answers `shift` standard deviations longer than the baseline's."""
    rng = np.random.default_rng(seed)
    differences = rng.normal(shift * 300, 300, count)
    truth = sigmoid(constant + slope * np.tanh(differences / differences.std(ddof=1)))
    return (rng.random(count) < truth).astype(float), differences


def second_implementation(preferences, differences, difficulty=None, gamed=None) -> float:
    """The same likelihood, maximised by BFGS."""
    columns = [np.ones(len(preferences)), np.tanh(differences / differences.std(ddof=1))]
    columns += [] if difficulty is None else [difficulty]
    features, rows = np.stack(columns, 1), np.ones(len(preferences))
    if gamed is not None:
        more = np.stack([np.zeros(len(gamed.preferences)), np.tanh(gamed.differences), gamed.difficulty], 1)
        features, preferences = np.vstack([features, more]), np.concatenate([preferences, gamed.preferences])
        rows = np.concatenate([rows, np.full(len(more), GAMED_WEIGHT)])

    def loss(weights):
        logits = features @ weights
        likelihood = rows * (preferences * logits - np.logaddexp(0, logits))
        return -likelihood.sum() + PRIOR * (weights**2).sum() / 2

    weights = optimize.minimize(loss, np.zeros(features.shape[1]), method="BFGS", options={"gtol": 1e-8}).x
    return float(sigmoid(weights[0] + (weights[2] * difficulty if difficulty is not None else 0)).mean())


def test_without_differences_of_length_it_is_the_mean_preference() -> None:
    preferences = np.array([1.0, 1.0, 0.0, 0.5, 1.0, 0.25])
    assert length_controlled(preferences, np.zeros(6)).win_rate == pytest.approx(preferences.mean(), abs=1e-4)


def test_without_an_effect_of_length_pseudo_values_are_the_preferences() -> None:
    """The jackknife value of a mean is the value itself."""
    preferences = np.array([1.0, 0.0, 1.0, 0.5, 0.5, 1.0, 0.0, 1.0])
    assert length_controlled(preferences, np.zeros(8)).pseudo_values == pytest.approx(preferences, abs=0.02)


@pytest.mark.parametrize("seed", range(3))
def test_it_is_the_maximum_of_the_likelihood(seed: int) -> None:
    preferences, differences = drawn(seed)
    assert length_controlled(preferences, differences).win_rate == pytest.approx(
        second_implementation(preferences, differences), abs=1e-6
    )


def test_alpacaevals_full_model_with_difficulty_and_gamed_baselines() -> None:
    rng = np.random.default_rng(5)
    preferences, differences = drawn(5)
    difficulty = rng.normal(0, 1, len(preferences))
    gamed = Gamed(rng.random(60), rng.normal(0, 1.5, 60), rng.normal(0, 1, 60))
    found = length_controlled(preferences, differences, difficulty=difficulty, gamed=gamed)
    assert found.win_rate == pytest.approx(second_implementation(preferences, differences, difficulty, gamed), abs=1e-6)


@pytest.mark.parametrize("shift", [-1.0, 0.0, 1.0])
def test_it_finds_the_win_rate_at_equal_length_where_the_raw_one_does_not(shift: float) -> None:
    found = [length_controlled(*drawn(seed, 200, shift=shift)) for seed in range(20)]
    truth = sigmoid(0.3)
    controlled, raw = np.mean([one.win_rate for one in found]), np.mean([one.raw for one in found])
    error = np.std([one.win_rate for one in found]) / 20**0.5
    assert abs(controlled - truth) < 4 * error
    if shift:
        assert abs(raw - truth) > 0.08


def test_the_jackknife_is_what_refitting_without_each_prompt_gives() -> None:
    preferences, differences = drawn(1, 40)
    found = length_controlled(preferences, differences)
    for i in (0, 17, 39):
        rest = np.delete(preferences, i), np.delete(differences, i)
        wanted = 40 * second_implementation(preferences, differences) - 39 * second_implementation(*rest)
        assert found.pseudo_values[i] == pytest.approx(wanted, abs=1e-4)


def test_its_spread_is_the_bootstraps() -> None:
    """The standard error of fitted probabilities, which AlpacaEval calls lc_standard_error, would be 0 here."""
    preferences, differences = drawn(2, 300)
    found = length_controlled(preferences, differences)
    rng = np.random.default_rng(0)
    samples = [rng.integers(0, 300, 300) for _ in range(200)]
    again = [second_implementation(preferences[s], differences[s]) for s in samples]
    assert found.pseudo_values.std(ddof=1) / 300**0.5 == pytest.approx(np.std(again), rel=0.15)
    assert found.pseudo_values.mean() == pytest.approx(found.win_rate, abs=0.005)


def test_a_policy_that_wins_everything_has_a_rate_all_the_same() -> None:
    found = length_controlled(np.ones(50), np.linspace(-1, 1, 50))
    assert 0.99 < found.win_rate <= 1
    assert np.isfinite(found.pseudo_values).all()


def test_it_says_where_it_extrapolates() -> None:
    preferences, differences = drawn(3, shift=4.0)
    problems = length_controlled(preferences, differences).problems()
    assert any("100% of the answers are longer" in text for text in problems)
    assert length_controlled(*drawn(3)).problems() == []


@pytest.mark.parametrize(
    ("preferences", "differences"), [([1, 0], [1, 2]), ([1, 0, 2], [1, 2, 3]), ([1, 0, 1], [1, 2, np.nan])]
)
def test_what_cannot_be_fitted_is_refused(preferences, differences) -> None:
    with pytest.raises(ValueError, match=r"at least three|must lie in \[0, 1\]"):
        length_controlled(np.array(preferences, dtype=float), np.array(differences, dtype=float))


def scores(scorer: str) -> pd.DataFrame:
    """Two arms of three seeds whose jackknife values lie partly outside of [0, 1]."""
    rows = []
    for arm, constant in (("simpo", 0.9), ("dpo", -0.6)):
        for seed in range(3):
            values = length_controlled(*drawn(seed + 10, 200, constant=constant)).pseudo_values
            rows += [
                {"arm": arm, "seed": seed, "prompt_id": str(i), "scorer": scorer, "score": v}
                for i, v in enumerate(values)
            ]
    return pd.DataFrame(rows)


def test_the_decision_rule_takes_jackknife_values_and_refuses_other_scores_outside_of_0_and_1() -> None:
    frame = scores("length_controlled")
    assert not frame["score"].between(0, 1).all()
    result = verdict(frame, metric="length_controlled")
    assert result["verdict"] == "simpo"
    assert result["difference"] == pytest.approx(sigmoid(0.9) - sigmoid(-0.6), abs=0.06)
    with pytest.raises(UsageError, match=r"outside \[0, 1\]"):
        checked(scores("judge"))
    frame.loc[0, "score"] = np.inf
    with pytest.raises(UsageError, match=r"outside \[0, 1\]"):
        checked(frame)


def judged(folder: Path, metric: str, form: str, count: int = 40) -> Path:
    """A study of one run whose answers a judge has compared with the base's."""
    study = folder / "study"
    prompts = [{"split": "golden", "prompt_id": f"p{i}", "about": {"form": form}} for i in range(count)]
    write_jsonl(study / "prompts.jsonl", prompts)
    (study / "study.yaml").write_text(f"metric: {metric}\narms: [simpo, dpo]\n")
    wins, gap = drawn(0, count)
    rows = zip(wins, gap, strict=True)
    found = [Preference("golden", f"p{i}", float(w), 2000 + int(g), 2000) for i, (w, g) in enumerate(rows)]
    write_preferences(study / "trials" / "a", "judge", found, ["golden"])
    return study


def controlled(study: Path, config: LengthControlConfig) -> tuple[str, list[str]]:
    """Run the scorer; return the name of its scores and its warnings."""
    prompts = list(read_jsonl(study / "prompts.jsonl"))
    base = Run(study / "base", {"flags": []}, {})
    run = Run(study / "trials" / "a", {"flags": [], "arm": "simpo", "config": "c", "seed": 0}, {})
    scorer = find_scorer("length_controlled")
    assert scorer is not None
    assert scorer.score_study is not None
    scoring = Scoring(ScoreConfig(length_control=config), ["length_controlled"], ("golden",), study, None)
    (name,) = scorer.score_study(Stored(study, ("golden",), prompts, {}, (base, run)), scoring)
    return name, read_json(study / "length_controlled.json")["warnings"]


def alpaca_files(folder: Path, count: int) -> LengthControlConfig:
    rng = np.random.default_rng(0)
    rows = {"preference": rng.random(80), "std_delta_len": rng.normal(0, 1, 80), "instruction_difficulty": 0.1}
    pd.DataFrame(rows).to_csv(folder / "gamed.csv")
    pd.DataFrame({"instruction_difficulty": rng.normal(0, 1, count)}).to_csv(folder / "difficulty.csv")
    return LengthControlConfig(difficulty=str(folder / "difficulty.csv"), gamed=str(folder / "gamed.csv"))


@pytest.mark.parametrize(
    ("metric", "form", "has_files", "name", "warns"),
    [
        ("judge", "", False, "length_controlled_minimal", False),
        ("judge", "alpaca_eval", False, "length_controlled_minimal", True),
        ("judge", "alpaca_eval", True, "length_controlled", False),
        ("length_controlled", "", False, "length_controlled", True),
        ("length_controlled_minimal", "", False, "length_controlled_minimal", False),
    ],
)
def test_scores_have_the_leaderboards_name_only_where_they_are_its_fit_or_an_older_study_registered_it(
    metric: str, form: str, has_files: bool, name: str, warns: bool, tmp_path: Path
) -> None:
    config = alpaca_files(tmp_path, 40) if has_files else LengthControlConfig()
    found, warnings = controlled(judged(tmp_path, metric, form), config)
    assert found == name
    assert any("leaderboard values" in text for text in warnings) == warns


def test_a_config_with_broken_files_of_alpaca_eval_is_refused_before_anything_runs(tmp_path: Path) -> None:
    config = alpaca_files(tmp_path, 40)
    (tmp_path / "difficulty.csv").write_text("a,instruction_difficulty\n0,hard\n")
    problems = list(length_control_problems(config))
    assert len(problems) == 1
    assert "row 1: instruction_difficulty is 'hard'; allowed: a number" in problems[0]
    (alone,) = length_control_problems(LengthControlConfig(gamed=config.gamed))
    assert "needs score.length_control.difficulty beside it" in alone


def test_the_mean_of_the_jackknife_values_keeps_the_pull_of_the_gamed_baselines() -> None:
    preferences, differences = drawn(4)
    rng = np.random.default_rng(4)
    gamed = Gamed(np.full(800, 0.9), rng.normal(1, 1, 800), rng.normal(0, 1, 800))
    found = length_controlled(preferences, differences, difficulty=rng.normal(0, 1, 400), gamed=gamed)
    assert found.pseudo_values.mean() == pytest.approx(found.win_rate, abs=1e-12)


def alpaca_like(case: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, Gamed]:
    """Preferences, differences, difficulty and gamed rows in AlpacaEval's manner, 805 prompts, the same each time."""
    rng, count = np.random.default_rng(0), 805
    difficulty = rng.normal(0, 1, count)
    lengths, preferences = [], []
    for shift in (500, -500):
        gap = rng.normal(shift, 400, count)
        lengths.append(gap / gap.std(ddof=1))
        preferences.append((rng.random(count) < sigmoid(-0.8 * np.tanh(lengths[-1]) + 0.1 * difficulty)).astype(float))
    gamed = Gamed(np.concatenate(preferences), -np.concatenate(lengths), np.tile(difficulty, 2))
    for constant, slope, shift in ((0.3, 1.2, 200), (-1.0, 0.6, -300), (1.0, 1.5, 600))[: case + 1]:
        baseline = rng.integers(200, 2000, count)
        gap = np.maximum(10, baseline + rng.normal(shift, 500, count)).astype(int) - baseline
        truth = sigmoid(constant + slope * np.tanh(gap / np.std(gap, ddof=1)) + 0.3 * difficulty)
        wins = np.clip((rng.random(count) < truth) + rng.normal(0, 0.03, count), 0, 1)
    return wins, gap.astype(float), difficulty, gamed


# What alpaca-eval 0.6.6 itself returned for these data (length_controlled_v1 and length_controlled_minimal), in percent.
ALPACA_EVAL = [(58.613, 58.188), (26.953, 26.572), (74.993, 73.403)]


@pytest.mark.parametrize("case", range(3))
def test_it_agrees_with_alpaca_eval_to_a_twentieth_of_a_point(case: int) -> None:
    wins, gap, difficulty, gamed = alpaca_like(case)
    full, minimal = ALPACA_EVAL[case]
    assert 100 * length_controlled(wins, gap, difficulty=difficulty, gamed=gamed).win_rate == pytest.approx(
        full, abs=0.05
    )
    assert 100 * length_controlled(wins, gap).win_rate == pytest.approx(minimal, abs=0.05)


def test_alpacaevals_own_files_are_read_with_their_sign(tmp_path) -> None:
    """Its lengths are the baseline's minus the answer's."""
    wins, gap, difficulty, gamed = alpaca_like(0)
    rows = {
        "preference": gamed.preferences,
        "std_delta_len": -gamed.differences,
        "instruction_difficulty": gamed.difficulty,
    }
    pd.DataFrame(rows).to_csv(tmp_path / "df_gamed.csv")
    pd.DataFrame({"instruction_difficulty": difficulty}).to_csv(tmp_path / "difficulty.csv", index=False)
    config = LengthControlConfig(difficulty=str(tmp_path / "difficulty.csv"), gamed=str(tmp_path / "df_gamed.csv"))
    prompts = [{"split": "golden", "prompt_id": f"p{i}"} for i in range(805)]
    folder = tmp_path / "study" / "trials" / "a"
    found = [
        Preference("golden", f"p{i}", float(w), 1000 + int(g), 1000)
        for i, (w, g) in enumerate(zip(wins, gap, strict=True))
    ]
    write_preferences(folder, "judge", found, ["golden"])
    base = Run(tmp_path / "study" / "base", {"flags": []}, {})
    run = Run(folder, {"flags": [], "arm": "simpo", "config": "c", "seed": 0}, {})
    stored = Stored(tmp_path / "study", ("golden",), prompts, {}, (base, run))
    values = control_runs(stored, config)[folder]
    facts = read_json(tmp_path / "study" / "length_controlled.json")["runs"]["a"]
    assert 100 * facts["win_rate"] == pytest.approx(ALPACA_EVAL[0][0], abs=0.05)
    assert np.mean([one.preference for one in values]) == pytest.approx(facts["win_rate"], abs=0.01)
    short = LengthControlConfig(difficulty=str(tmp_path / "difficulty.csv"))
    with pytest.raises(UsageError, match="805 numbers for 3 golden prompts"):
        control_runs(replace(stored, prompts=prompts[:3]), short)
