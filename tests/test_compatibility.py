"""The public surface: commands, exit statuses, what is imported from Python, columns and fields of files.

A name that stands here may be added to, and not removed or renamed: studies, scripts and scorers of users rely on it.
"""

from __future__ import annotations

import dataclasses
import inspect
import io
import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

import harness.decide
import harness.scorers
from harness.config.paths import embedded_dir
from harness.study.scores_csv import SCORE_COLUMNS
from tests.conftest import SMALL, overriding

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = (
    "sweep",
    "train",
    "score",
    "decide",
    "report",
    "dashboard",
    "calibrate",
    "bench",
    "exchange",
    "verify",
    "embedded",
)
COLUMNS = (
    *("arm", "config", "seed", "split", "prompt_id", "scorer", "score"),
    *("cluster", "tokens", "chars", "unscored_reason", "stage", "flag"),
)
VERDICT = {
    *("verdict", "level", "metric", "arms", "configs", "difference", "ci95", "ci90", "margin", "alpha"),
    *("beyond_margin", "n_prompts", "n_clusters", "n_seeds", "n_unscored", "seed_variance", "prompt_variance"),
    *("minimum_detectable_difference", "to_settle", "means", "run_means", "guards", "warnings", "reason"),
}
REGISTERED = {
    *("study", "question", "arms", "contrast", "configs", "seeds", "tuned", "tuning_seeds", "metric", "margin"),
    *("alpha", "guards", "looks", "family", "model", "data", "warnings", "command", "created"),
    *("fixed", "fixed_sha256", "sha256"),
}
FIXED = {
    *("question", "metric", "margin", "alpha", "guards", "looks", "search", "score", "contents"),
    *("data", "train", "generate"),
}
TRIAL_FILES = {"config.yaml", "manifest.json", "train.jsonl", "completions.jsonl", "pairs.jsonl", "scores.jsonl"}
SCORES = """\
arm,config,seed,split,prompt_id,scorer,score
simpo,a,1,golden,p,checks,1
simpo,a,1,golden,q,checks,1
dpo,b,1,golden,p,checks,0
dpo,b,1,golden,q,checks,1
"""


# Commands

HELP = """
import contextlib, io, json, runpy, sys

said = {}
for command in sys.argv[1].split(","):
    output, status = io.StringIO(), 0
    for option in ("--help", "no/such=1"):
        sys.argv = [command, option]
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(io.StringIO()) as errors:
            try:
                runpy.run_module("harness." + command, run_name="__main__", alter_sys=True)
                status = 0
            except SystemExit as stop:
                status = stop.code or 0
        said.setdefault(command, []).append([status, output.getvalue(), errors.getvalue()])
print(json.dumps([said, "torch" in sys.modules]))
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> tuple[dict[str, list[tuple[int, str, str]]], bool]:
    """Status, output and errors of each command, first with --help, then with a wrong argument; is torch loaded."""
    command = [sys.executable, "-c", HELP, ",".join(COMMANDS)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path_factory.mktemp("help"))
    found, torch = json.loads(done.stdout)
    return found, torch


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_says_what_it_does(command: str, said) -> None:
    status, output, _ = said[0][command][0]
    assert status == 0
    assert f"harness.{command}" in output
    assert "Example" in output or command in ("dashboard", "calibrate", "exchange", "embedded")


@pytest.mark.parametrize("command", COMMANDS)
def test_wrong_usage_ends_with_2_and_a_sentence(command: str, said) -> None:
    status, _, errors = said[0][command][1]
    assert status == 2, errors
    assert errors.strip()
    assert "Traceback" not in errors


def test_help_and_refusals_load_no_torch(said) -> None:
    assert not said[1]


# Python


def test_the_verdict_is_asked_for_from_python_by_these_names() -> None:
    parameters = inspect.signature(harness.decide.verdict).parameters
    defaults = {name: parameter.default for name, parameter in list(parameters.items())[1:]}
    assert next(iter(parameters)) == "scores"
    assert all(parameters[name].kind is inspect.Parameter.KEYWORD_ONLY for name in defaults)
    expected = {"metric": None, "margin": 0.05, "alpha": 0.05, "arms": ("simpo", "dpo"), "cluster": None, "guards": ()}
    assert expected.items() <= defaults.items()
    found = harness.decide.verdict(pd.read_csv(io.StringIO(SCORES)))
    assert found.keys() >= VERDICT
    assert found["difference"] == 0.5


def test_scorers_of_users_get_and_give_these_fields() -> None:
    fields = [field.name for field in dataclasses.fields(harness.scorers.Score)]
    assert fields == ["split", "prompt_id", "score", "unscored_reason"]
    assert harness.scorers.Score("golden", "p", 0.5).unscored_reason == ""
    assert [field.name for field in dataclasses.fields(harness.scorers.TrialOutputs)] == [
        "prompts",
        "completions",
        "pairs",
    ]


# Two studies in one process: what they share, and the files that each writes

OWN = """
from harness.scorers import Score

def score(outputs):
    return [Score(row["split"], row["prompt_id"], {value}) for row in outputs.completions]
"""
# The commands are equal: only the folder that they run in tells the studies apart.
COMMAND = overriding(
    SMALL,
    *("+method=simpo,dpo", "seed=0", "study=s", "results_dir=results", "score.scorers=[mine.py]"),
    *("data.train=train.jsonl", "data.dev=dev.jsonl", "data.golden=golden.jsonl"),
    *("data.max_golden_prompts=12", "data.max_dev_prompts=6"),
)
RUN = """
import json, os, sys
from pathlib import Path
from tests.faults.disturbed import ended, in_child, prepare

command, places = json.loads(sys.argv[1]), json.loads(sys.argv[2])
prepare()
from harness.sweep.app import run_sweep

def run(order):
    for place in order:
        os.chdir(place)
        assert [outcome.status for outcome in run_sweep(command)[0].outcomes] == ["complete"] * 3
    return 0

for order in places:
    assert ended(in_child(Path(order[0]), lambda: run(order))) == 0, Path(order[0], "log.txt").read_text()[-3000:]
"""


@pytest.fixture(scope="module")
def studies(tmp_path_factory) -> Path:
    """Two studies, `a` and `b`: in `alone` in a process each, in `both` in one process."""
    root = tmp_path_factory.mktemp("studies")
    rows = {split: (embedded_dir() / f"{split}.jsonl").read_text().splitlines() for split in ("train", "dev", "golden")}
    for way in ("alone", "both"):
        for number, name in enumerate("ab"):
            folder = root / way / name
            folder.mkdir(parents=True)
            for split, lines in rows.items():
                (folder / f"{split}.jsonl").write_text("\n".join(lines[number::2][:60]) + "\n")
            (folder / "mine.py").write_text(OWN.format(value=number / 2))
    orders = [[str(root / "alone" / "a")], [str(root / "alone" / "b")], [str(root / "both" / name) for name in "ab"]]
    command = [sys.executable, "-c", RUN, json.dumps(COMMAND), json.dumps(orders)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return root


@pytest.mark.slow
def test_two_studies_in_one_process_share_nothing(studies: Path) -> None:
    scores = {path.parents[2]: path.read_bytes() for path in studies.glob("*/*/results/s/scores.csv")}
    assert len(scores) == 4
    for name in "ab":
        alone, both = studies / "alone" / name, studies / "both" / name
        assert scores[alone] == scores[both]
        assert sorted(path.name for path in alone.glob("results/s/trials/*")) == sorted(
            path.name for path in both.glob("results/s/trials/*")
        )
        (mean,) = set(pd.read_csv(both / "results/s/scores.csv").query("scorer == 'mine'")["score"])
        assert mean == "ab".index(name) / 2
    assert scores[studies / "alone" / "a"] != scores[studies / "alone" / "b"]


@pytest.mark.slow
def test_a_study_has_these_files_fields_and_columns(studies: Path) -> None:
    study = studies / "alone" / "a" / "results" / "s"
    names = {path.name for path in study.iterdir()}
    assert names >= {
        "study.yaml",
        "trials",
        "base",
        "scores.csv",
        "verdict.json",
        "report.html",
        "report.md",
        "figures",
    }
    for trial in (study / "trials").iterdir():
        assert {path.name for path in trial.iterdir()} >= TRIAL_FILES | {"adapter"}
    registered = yaml.safe_load((study / "study.yaml").read_text())
    assert registered.keys() >= REGISTERED
    assert registered["fixed"].keys() >= FIXED
    assert registered["data"].keys() >= {"train", "dev", "golden"}
    assert json.loads((study / "verdict.json").read_text()).keys() >= VERDICT | {"base_mean"}
    assert (study / "scores.csv").read_text().splitlines()[0] == ",".join(COLUMNS)
    assert SCORE_COLUMNS == COLUMNS
