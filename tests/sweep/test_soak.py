"""What must not grow with the number of trials: objects that are kept, trials that are asked, work of the report."""

from __future__ import annotations

import gc
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pandas as pd
import pytest

from harness.config.launchers import LAUNCHERS
from harness.report.facts import facts
from harness.report.page import render_report
from harness.report.search import tried_configs
from harness.report.study import COMPLETE, Study, Trial, read_study
from harness.report.tables import trial_table
from harness.study.decision import edge_warnings
from harness.study.files import FileCache, write_json
from harness.sweep import launch
from harness.sweep.design import single_trial
from harness.sweep.problems import compose_run
from harness.sweep.trial import Context
from harness.train.memory import FrozenImports
from tests.conftest import SMALL
from tests.study_fixture import build_study


def trials(tmp_path: Path, count: int) -> list:
    trial = compose_run([*SMALL, f"results_dir={tmp_path}", "+method=dpo", "seed=0"])
    return [single_trial(replace(trial, study="s", seed=seed)) for seed in range(count)]


class SomeLauncher:
    """A launcher of Hydra's, as far as the sweep knows it; notes how many jobs it gets at once."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def launch(self, jobs, initial_job_idx):
        self.sizes.append(len(jobs))
        outcome = {"trial_id": "t", "arm": "dpo", "config": "c", "seed": 0, "status": "complete"}
        return [SimpleNamespace(return_value=outcome) for _ in jobs]


def test_a_launcher_that_starts_a_process_for_every_job_at_once_gets_few_at_once(tmp_path: Path) -> None:
    """Hydra keeps what it composed for every job of a launch, and each waiting process takes memory."""
    few, most = SomeLauncher(), 4 * len(os.sched_getaffinity(0))
    launching = launch.Launching(LAUNCHERS["submitit_local"], few, Context())
    found = launching.run(trials(tmp_path, 2 * most + 1))
    assert [outcome.status for outcome in found] == ["complete"] * (2 * most + 1)
    assert few.sizes == [most, most, 1]


def test_the_progress_bar_asks_only_trials_that_have_scores_and_are_not_known_to_be_complete(
    tmp_path: Path, monkeypatch
) -> None:
    begun, never = trials(tmp_path, 2)
    write_json(begun.folder / "scores.jsonl", {})
    asked: list[int] = []
    monkeypatch.setattr(launch.Trial, "is_complete", lambda trial, files: asked.append(trial.seed) or len(asked) > 1)
    monkeypatch.setattr(launch, "POLL_SECONDS", 0.01)
    with launch.show_progress([begun, never], FileCache()):
        deadline = time.monotonic() + 300
        while len(asked) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)  # ten more rounds
    assert asked == [begun.seed] * 2


def test_what_is_imported_later_is_taken_out_of_the_collectors_rounds_too(monkeypatch) -> None:
    frozen: list[int] = []
    imports = FrozenImports()
    imports.freeze()
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append(len(sys.modules)))
    imports.freeze()
    assert frozen == []
    for number in range(1000):  # more modules than this process has had at any time before
        monkeypatch.setitem(sys.modules, f"soak{number}", ModuleType(f"soak{number}"))
    imports.freeze()
    imports.freeze()
    assert len(frozen) == 1


@pytest.fixture
def large() -> Study:
    """A study of 2,000 trials as the report sees it: a config with two tuning seeds each, 20 dev prompts."""
    runs = [(arm, f"beta={config}", seed) for arm in ("simpo", "dpo") for config in range(500) for seed in (100, 101)]
    scores = pd.DataFrame(
        [(*run, "dev", "checks", n % 2, "select") for run in runs for n in range(20)],
        columns=["arm", "config", "seed", "split", "scorer", "score", "stage"],
    )
    trials = tuple(
        Trial(f"{number:012x}", *run, COMPLETE, {"method": {"beta": run[1]}}, {}, (), ())
        for number, run in enumerate(runs)
    )
    settings = {"metric": "checks", "tuning_seeds": [100, 101]}
    return Study(Path("large"), settings, None, trials, scores, {}, ())


def test_the_tables_of_2000_trials_take_seconds(large: Study) -> None:
    """Not a pass over all scores for each trial: each of the 2,000 would take as long as this one."""
    start = time.process_time()
    for _ in range(20):
        large.scores[(large.scores["arm"] == "dpo") & (large.scores["config"] == "beta=1")].groupby("seed")[
            "score"
        ].mean()
    one_pass = (time.process_time() - start) / 20
    start = time.process_time()
    table, tried = trial_table(large), tried_configs(large)
    assert time.process_time() - start < 500 * one_pass
    assert table is not None
    assert set(table.frame["checks on dev"]) == {"50.0%"}
    assert [len(configs) for configs in tried.values()] == [500, 500]
    assert {(one.mean, one.seeds) for configs in tried.values() for one in configs} == {(0.5, 2)}


def test_lists_of_hundreds_of_values_are_cut_short(large: Study) -> None:
    assert facts(large)["Method settings"].endswith(" | and 990 more: see Trials")
    (warning,) = edge_warnings([f"beta={n}" for n in range(1, 125)], "beta=1")
    assert "(124 values from 1 to 124)" in warning


def test_a_learning_curve_is_made_where_it_is_drawn_only(tmp_path: Path) -> None:
    study = build_study(tmp_path / "study", prompts=5)
    render_report(study)
    trial = read_study(study).trials[0]
    assert trial.steps
    assert "curve" not in vars(trial)
    assert len(trial.curve) == len(trial.steps)
