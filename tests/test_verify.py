"""`harness.verify`: nothing to say of a study as the sweep left it, and every change to it named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from harness.study.manifest import read_manifest, write_manifest
from harness.sweep.app import run_sweep
from harness.verify import main, verify_study
from tests.conftest import SMALL

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    results = tmp_path_factory.mktemp("verify") / "results"
    grid = ["arms.dpo.beta=0.1,0.2", "arms.simpo.beta=2,3", "tuning_seeds=[7]", "seed=1,2"]
    run_sweep([*SMALL, "+method=simpo,dpo", "study=s", f"results_dir={results}", *grid])
    return results / "s"


@pytest.fixture
def study(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "s")


def trial(study: Path) -> Path:
    """A trial that answered golden."""
    return next(
        path.parent for path in sorted(study.glob("trials/*/completions.jsonl")) if "golden" in path.read_text()
    )


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_of_a_study_as_the_sweep_left_it_there_is_nothing_to_say(whole: Path, capsys) -> None:
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    assert main([str(whole)]) == 0
    assert "all as the sweep left it" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()} == before


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def without_hash(path: Path) -> None:
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "sha256"}))


def amend(folder: Path, **facts) -> None:
    """Change a manifest as a trial itself would, with its hash."""
    write_manifest(folder, read_manifest(folder) | facts)


CHANGES = {
    "weights": (lambda t: flip(t / "adapter" / "adapter_model.safetensors"), "adapter_model.safetensors was changed"),
    "a_missing_log": (lambda t: (t / "train.jsonl").unlink(), "train.jsonl is missing"),
    "a_foreign_file": (lambda t: (t / "notes.txt").write_text("x"), "notes.txt is foreign"),
    "foreign_weights": (lambda t: (t / "adapter" / "x.bin").write_text("x"), "adapter/x.bin is foreign"),
    "a_lost_manifest": (lambda t: (t / "manifest.json").unlink(), "foreign or unfinished: it has no manifest"),
    "a_broken_manifest": (lambda t: (t / "manifest.json").write_text("{"), "manifest.json cannot be read"),
    "a_digit_in_a_manifest": (
        lambda t: edit(t / "manifest.json", '"seed": ', '"seed": 1'),
        "manifest.json was changed",
    ),
    "another_config": (
        lambda t: edit(t / "config.yaml", "\nseed: ", "\nseed: 1"),
        "config.yaml and the study's data give trial",
    ),
    "a_damaged_key": (lambda t: edit(t / "manifest.json", '"sha256": ', '"sha356": '), "manifest.json was changed"),
    "no_hash": (lambda t: without_hash(t / "manifest.json"), "manifest.json holds no hash of itself"),
    "another_base": (lambda t: amend(t, base_sha256="0"), "another base"),
    "other_tokens": (lambda t: amend(t, consumed_tokens_sha256="0"), "identical data: "),
    "an_unfinished_trial": (lambda t: amend(t, status="running"), "it is running: run the sweep's command again"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_done_to_a_trial_is_named(change: str, study: Path) -> None:
    disturb, said = CHANGES[change]
    folder = trial(study)
    disturb(folder)
    found = verify_study(study)
    assert any(said in problem for problem in found), found
    assert any(folder.name in problem or problem.startswith("identical data") for problem in found)


FOREIGN = {
    "a_file": ("notes.txt", "notes.txt is foreign"),
    "a_file_among_trials": ("trials/notes.txt", "trials/notes.txt is foreign"),
    "a_folder": ("old/scores.csv", "old is foreign"),
    "a_trial": ("trials/0123456789ab/scores.jsonl", "trials/0123456789ab: foreign or unfinished: it has no manifest"),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_what_nobody_of_the_harness_put_into_a_study_is_named(what: str, study: Path) -> None:
    name, said = FOREIGN[what]
    (study / name).parent.mkdir(exist_ok=True)
    (study / name).write_text("")
    assert any(said in problem for problem in verify_study(study))


def test_a_file_elsewhere_that_a_manifest_names_is_not_read(study: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "private").write_text("mine")
    folder = trial(study)
    names = [str(tmp_path / "private"), "../../../private"]
    known = read_manifest(folder)["files"] | {name: {"bytes": 4, "sha256": "0"} for name in names}
    amend(folder, files=known)
    real = Path.open
    monkeypatch.setattr(Path, "open", lambda path, *a, **k: real(path, *a, **k) if path.name != "private" else 1 / 0)
    found = verify_study(study)
    assert all(
        any(f"manifest.json names {name}, which is not in the folder" in text for text in found) for name in names
    )


def test_a_trial_under_the_name_of_another_is_named(study: Path) -> None:
    """Both files agree with each other; what the config gives is another trial's id."""
    folder = trial(study)
    other = folder.with_name("0123456789ab")
    folder.rename(other)
    write_manifest(other, read_manifest(other) | {"trial_id": other.name})
    found = [problem for problem in verify_study(study) if other.name in problem]
    assert any(f"give trial {folder.name}" in problem for problem in found), found


def test_a_run_that_nobody_registered_is_foreign_and_a_registered_one_that_is_gone_is_missed(study: Path) -> None:
    """A run of a colleague's study fits in all but the registration: same base, same data, another seed."""
    folder = trial(study)
    amend(folder, seed=9)
    arm = read_manifest(folder)["arm"]
    found = verify_study(study)
    assert any(
        f"{arm} " in problem and "seed 9 is foreign: study.yaml did not register it" in problem for problem in found
    )
    shutil.rmtree(folder)
    assert any(
        problem.startswith(f"{arm}: there is no trial of the registered seed") for problem in verify_study(study)
    )


@pytest.mark.parametrize("name", ["ledger.jsonl", "selection.json"])
def test_what_was_looked_at_and_selected_must_equal_the_backup_copy(name: str, study: Path) -> None:
    for change in (lambda path: path.write_text(path.read_text() + " "), Path.unlink):
        change(study / name)
        assert any(problem.startswith(f"{name} differs from its backup copy") for problem in verify_study(study))


def test_a_verdict_without_one_of_its_warnings_is_named(study: Path) -> None:
    path = study / "verdict.json"
    stored = json.loads(path.read_text())
    assert stored["warnings"]
    for number in range(len(stored["warnings"])):
        left = [text for n, text in enumerate(stored["warnings"]) if n != number]
        path.write_text(json.dumps(stored | {"warnings": left}))
        assert any("lacks the warning" in problem for problem in verify_study(study)), stored["warnings"][number]


def test_an_answer_that_was_changed_makes_its_score_stale(study: Path) -> None:
    path = trial(study) / "completions.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    passed = {
        row["prompt_id"]
        for row in map(json.loads, (trial(study) / "scores.jsonl").read_text().splitlines())
        if row["split"] == "golden" and row["scorer"] == "checks" and row["score"] == 1.0
    }
    next(row for row in rows if row["split"] == "golden" and row["prompt_id"] in passed)["completion"] = "no"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = " ".join(verify_study(study))
    assert "completions.jsonl was changed" in found
    assert "scores are not those of its answers: stale" in found


def test_scores_that_were_changed_are_named_and_so_is_the_verdict_that_no_longer_follows(study: Path) -> None:
    path = study / "scores.csv"
    lines = path.read_text().splitlines()
    wrong = (n for n, line in enumerate(lines) if line.startswith("simpo,") and ",checks,0.0," in line)
    index = next(n for n in wrong if ",golden," in lines[n])
    lines[index] = lines[index].replace(",checks,0.0,", ",checks,1.0,")
    path.write_text("\n".join(lines) + "\n")
    found = " ".join(verify_study(study))
    assert "scores.csv is not what the trials' scores.jsonl say" in found
    assert "verdict.json: difference is" in found


def test_a_verdict_that_was_changed_is_named(study: Path) -> None:
    path = study / "verdict.json"
    stored = json.loads(path.read_text())
    path.write_text(json.dumps(stored | {"verdict": "simpo"}))
    assert any("verdict.json: verdict is simpo" in problem for problem in verify_study(study))


def test_a_question_that_was_changed_is_named_and_nothing_else_is_believed(study: Path) -> None:
    edit(study / "study.yaml", "margin: 0.05", "margin: 0.01")
    found = verify_study(study)
    assert len(found) == 1
    assert "was changed after it was registered" in found[0]


def test_the_command_exits_with_1_for_problems_and_with_2_for_no_study(study: Path, tmp_path: Path, capsys) -> None:
    (trial(study) / "train.jsonl").unlink()
    assert main([str(study)]) == 1
    assert "1 problem" in capsys.readouterr().out
    assert main([str(tmp_path / "nothing")]) == 2
    assert "no study.yaml" in capsys.readouterr().err
