"""Studies of the commit before the packages (b4b16c8): swept again, scored, decided, reported and verified.

Nothing changes but verdict.json: they were decided by version 1 of the rule, and version 2 says so in one warning.

`old_studies.tar.xz` holds `results/tuned` (two configs per arm, three seeds, two looks, a guard of the user's own, runs
for their cost, weights kept), `results/noise-label_noise-*` (a family, three arms, no weights) and the guard's file.
The command of each study is in its study.yaml. Reports and caches were left out.
"""

from __future__ import annotations

import shlex
import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness.decide.__main__ import main as decide
from harness.decide.words import confidence
from harness.report.__main__ import main as report
from harness.score.__main__ import main as score
from harness.study.files import read_json, write_json
from harness.sweep.app import run_sweep
from harness.verify import verify_study

STUDIES = {"tuned": 15, "noise-label_noise-0": 7, "noise-label_noise-0.4": 7}  # trials, base included
RESULTS = ("scores.csv", "verdict.json")


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The old studies, in the folder that the test runs in, as relative paths in the commands need."""
    with tarfile.open(Path(__file__).with_name("old_studies.tar.xz")) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "results"


# What both versions of the rule reckon alike.
SAME = (
    *("difference", "metric", "arms", "margin", "alpha", "configs", "n_prompts", "n_clusters", "n_seeds"),
    *("n_unscored", "means", "run_means", "seed_variance", "prompt_variance", "base_mean"),
)


def assert_explained(now: dict[str, Any], before: dict[str, Any]) -> None:
    """What changed in a verdict follows from the rule's version, and one warning says what version 1 said."""
    assert now["rule_version"] == 2
    for key in SAME:
        if isinstance(before[key], float):
            assert now[key] == pytest.approx(before[key]), key
        else:
            assert now[key] == before[key], key
    assert now["level"] == ("config" if "selection" in now else before["level"])  # where dev has selected among configs
    (said,) = [text for text in now["warnings"] if "version 1 says" in text]
    assert f"version 1 says {before['verdict']}" in said
    low, high = (100 * end for end in before["ci95"])
    assert said.endswith(f"{confidence(before['alpha'])} interval {low:+.1f} to {high:+.1f} points")
    assert set(before["warnings"]) <= set(now["warnings"])


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of all files that hold data; logs and locks say only what ran."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in (".lock", "log.txt"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("first", ["tuned", "noise-label_noise-0"])
def test_the_command_of_an_old_study_runs_no_trial_and_changes_the_verdict_alone(first: str, old: Path) -> None:
    before = {name: contents(old / name) for name in STUDIES}
    said = {name: read_json(old / name / "verdict.json") for name in STUDIES}
    assert [verify_study(old / name) for name in STUDIES] == [[], [], []], "a verdict by version 1 is as it was left"
    python, option, module, *arguments = shlex.split(
        yaml.safe_load((old / first / "study.yaml").read_text())["command"]
    )
    assert (python, option, module) == ("python", "-m", "harness.sweep")
    results = run_sweep(arguments)
    assert results
    for result in results:
        name = result.report.parent.name
        assert result.launched == 0
        assert [outcome.status for outcome in result.outcomes] == ["complete"] * STUDIES[name]
        assert result.verdict == read_json(old / name / "verdict.json")
        after = contents(old / name)
        assert {file for file in before[name] if after.get(file) != before[name][file]} == {"verdict.json"}
        assert_explained(read_json(old / name / "verdict.json"), said[name])
        made = {file.split("/")[0] for file in after.keys() - before[name].keys()}
        assert made == {"report.html", "report.md", "figures"}
        assert verify_study(old / name) == []


def test_an_old_study_is_decided_with_what_version_1_said_and_then_to_the_same_bytes(old: Path, capsys) -> None:
    for name in STUDIES:
        said = read_json(old / name / "verdict.json")
        assert decide([str(old / name)]) == 0
        assert_explained(read_json(old / name / "verdict.json"), said)
        before = {file: (old / name / file).read_bytes() for file in RESULTS}
        capsys.readouterr()
        assert decide([str(old / name)]) == 0
        assert capsys.readouterr().out.encode() == before["verdict.json"]
        assert report([str(old / name)]) == 0
        assert {file: (old / name / file).read_bytes() for file in RESULTS} == before
        assert read_json(old / name / "verdict.json")["reason"] in (old / name / "report.md").read_text()
        assert verify_study(old / name) == []


def test_old_answers_are_scored_as_they_were(old: Path) -> None:
    for name in STUDIES:
        before = (old / name / "scores.csv").read_text().splitlines()
        assert score([str(old / name)]) == 0
        # Rows of a scorer that is run for the whole study move before the others; they did so in b4b16c8, too.
        assert sorted((old / name / "scores.csv").read_text().splitlines()) == sorted(before)
        assert verify_study(old / name) == []


def test_a_verdict_by_version_1_that_was_changed_is_found_out(old: Path) -> None:
    path = old / "noise-label_noise-0" / "verdict.json"
    for key, value in (("verdict", "simpo"), ("ci95", [0.01, 0.2]), ("difference", 0.1)):
        stored = path.read_bytes()
        write_json(path, read_json(path) | {key: value})
        assert any(text.startswith(f"verdict.json: {key} is") for text in verify_study(path.parent)), key
        path.write_bytes(stored)


def test_an_old_study_that_was_changed_is_found_out(old: Path) -> None:
    """The old fingerprints are still checked, not skipped."""
    scores = next((old / "tuned" / "trials").glob("*/scores.jsonl"))
    scores.write_text(scores.read_text().replace('"score": 0.0', '"score": 1.0', 1))
    weights = next((old / "tuned" / "trials").glob("*/adapter/adapter_model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00")
    found = verify_study(old / "tuned")
    assert f"trials/{scores.parent.name}: scores.jsonl was changed" in found
    assert f"trials/{weights.parents[1].name}: adapter/adapter_model.safetensors was changed" in found
