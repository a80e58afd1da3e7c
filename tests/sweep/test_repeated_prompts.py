"""A study from the time when a prompt that is asked twice counted once: it decides as before, and is not mixed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from harness.config.paths import embedded_dir
from harness.decide.__main__ import main as decide
from harness.report.__main__ import main as report
from harness.score.__main__ import main as score
from harness.score.trial_scores import trial_folders
from harness.study.errors import UsageError
from harness.study.files import read_json, read_jsonl, write_jsonl
from harness.study.integrity import fingerprints
from harness.study.manifest import load_manifest, write_manifest
from harness.study.registration import read_study, write_study
from harness.sweep.app import run_sweep
from harness.verify import verify_study
from tests.conftest import SMALL, overriding

TWICE = ("reverse dcba", "count the letters of abcd")
PROMPTS = [*TWICE, "sort bca", "sort cab", *TWICE]


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """The command of a study and its folder, as they were left when a repeated prompt counted once."""
    folder = tmp_path_factory.mktemp("earlier")
    write_jsonl(folder / "golden.jsonl", [{"prompt": text, "checks": [{"max_words": 9}]} for text in PROMPTS])
    data = [f"data.{split}={embedded_dir() / split}.jsonl" for split in ("train", "dev")]
    command = ["+method=simpo,dpo", "seed=0,1", "study=s", *SMALL, *data, f"data.golden={folder / 'golden.jsonl'}"]
    command.append(f"results_dir={folder / 'results'}")
    (result,) = run_sweep(command)
    study = result.report.parent
    _count_once(study)
    return command, study


def _count_once(study: Path) -> None:
    """Take the second answers away, and all that is known of them."""
    _rewrite(study / "prompts.jsonl", {"cluster": ""})
    for folder in trial_folders(study):
        _rewrite(folder / "completions.jsonl")
        _rewrite(folder / "scores.jsonl", {"cluster": ""})
        manifest = load_manifest(folder)
        manifest["files"] = fingerprints(folder, {})
        write_manifest(folder, manifest)
    registered = read_study(study / "study.yaml")
    registered["data"]["golden"]["prompts"] = len(PROMPTS) - len(TWICE)
    write_study(study / "study.yaml", registered)
    for name in ("ledger.jsonl", "ledger.jsonl.bak", "verdict.json"):
        (study / name).unlink(missing_ok=True)
    assert score([str(study)]) == 0
    assert decide([str(study)]) == 0


def _rewrite(path: Path, changes: dict[str, Any] | None = None) -> None:
    rows = [row for row in read_jsonl(path) if "#" not in row["prompt_id"]]
    write_jsonl(path, [{**row, **(changes or {})} if row["split"] == "golden" else row for row in rows])


def test_it_is_scored_decided_reported_and_verified(earlier: tuple[list[str], Path]) -> None:
    _, study = earlier
    before = read_json(study / "verdict.json")
    assert before["n_prompts"] == len(PROMPTS) - len(TWICE)
    assert score([str(study)]) == 0
    assert decide([str(study)]) == 0
    assert report([str(study)]) == 0
    assert read_json(study / "verdict.json")["difference"] == before["difference"]
    assert verify_study(study) == []


@pytest.mark.parametrize("more", [[], ["seed=0,1,2"]])
def test_its_command_is_refused_with_the_prompts_and_changes_no_file(
    more: list[str], earlier: tuple[list[str], Path]
) -> None:
    command, study = earlier
    before = {path: path.read_bytes() for path in study.rglob("*") if path.is_file()}
    with pytest.raises(UsageError) as caught:
        run_sweep(overriding(command, *more))
    said = str(caught.value)
    assert said.startswith(f"{study / 'study.yaml'}: ")
    assert "2 golden prompts that stand more than once" in said
    assert all(text in said for text in TWICE)
    assert "study=NAME" in said
    assert {path: path.read_bytes() for path in before} == before


def test_a_new_study_of_the_same_data_goes_on(earlier: tuple[list[str], Path]) -> None:
    command, study = earlier
    run_sweep(overriding(command, "study=new"))
    registered = yaml.safe_load((study.parent / "new" / "study.yaml").read_text())
    assert registered["data"]["golden"]["prompts"] == len(PROMPTS)
    assert run_sweep(overriding(command, "study=new"))[0].launched == 0
