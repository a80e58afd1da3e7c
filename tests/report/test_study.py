"""Reading a study: complete, half-finished, failed and broken folders."""

import json
import shutil
from pathlib import Path

import pytest

from harness.report.study import COMPLETE, DIVERGED, FAILED, UNFINISHED, read_study
from harness.study.errors import UsageError
from harness.study.files import write_json, write_text
from tests.study_fixture import ARMS, LABELS, build_study


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build_study(tmp_path_factory.mktemp("results") / "letters", prompts=12)


@pytest.fixture
def folder(built, tmp_path):
    return Path(shutil.copytree(built, tmp_path / "letters"))


def trial_of(folder, arm, seed):
    """Return the folder of an arm's trial."""
    for path in sorted((folder / "trials").iterdir()):
        manifest = json.loads((path / "manifest.json").read_text())
        if (manifest["arm"], manifest["seed"]) == (arm, seed):
            return path
    raise AssertionError((arm, seed))


def test_a_complete_study_is_read_whole(folder):
    study = read_study(folder)
    assert study.name == "letters"
    assert study.arms == ARMS
    assert (study.metric, study.split) == ("checks", "golden")
    assert [(c.arm, c.label, [t.seed for t in c.trials]) for c in study.configs] == [
        (arm, LABELS[arm], [0, 1, 2]) for arm in ARMS
    ]
    assert {trial.state for trial in study.trials} == {COMPLETE}
    assert study.base is not None
    assert len(study.base.completions) == 12 + 20
    assert study.problems == ()
    assert study.missing_runs() == []


def test_a_failed_trial_keeps_its_error_and_an_unfinished_one_says_so(folder):
    failed, unfinished, diverged = (trial_of(folder, "dpo", seed) for seed in (0, 1, 2))
    write_json(
        failed / "failure.json",
        {"arm": "dpo", "config": LABELS["dpo"], "seed": 0, "error": "MemoryError", "message": "out"},
    )
    (unfinished / "manifest.json").unlink()
    manifest = json.loads((diverged / "manifest.json").read_text())
    write_json(diverged / "manifest.json", manifest | {"status": "diverged"})
    study = read_study(folder)
    states = {trial.trial_id: trial.state for trial in study.trials}
    assert (states[failed.name], states[unfinished.name], states[diverged.name]) == (FAILED, UNFINISHED, DIVERGED)
    assert next(t.failure["message"] for t in study.trials if t.state == FAILED) == "out"
    assert [t.seed for c in study.configs if c.arm == "dpo" for t in c.trials] == [2]
    # What is known of the unfinished one comes from its config.
    assert next((t.arm, t.seed) for t in study.trials if t.state == UNFINISHED) == ("dpo", 1)
    assert study.missing_runs() == [("dpo", 0), ("dpo", 1)]


def test_a_running_trial_is_unfinished(folder):
    path = trial_of(folder, "simpo", 0) / "manifest.json"
    write_json(path, json.loads(path.read_text()) | {"status": "running"})
    assert [t.state for t in read_study(folder).trials if t.arm == "simpo"].count(UNFINISHED) == 1


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("manifest.json", '{"arm": "dp'),
        ("completions.jsonl", '{"split": "golden"}\n{"split": '),
        ("train.jsonl", "[1, 2]\n"),
        ("manifest.json", "[]"),
    ],
    ids=["truncated_json", "truncated_jsonl", "rows_that_are_no_mappings", "json_that_is_no_mapping"],
)
def test_a_broken_file_of_a_trial_is_named_and_the_rest_is_read(folder, name, text):
    path = trial_of(folder, "dpo", 1)
    write_text(path / name, text)
    study = read_study(folder)
    assert len(study.trials) == 6
    assert [problem for problem in study.problems if f"trials/{path.name}/{name} cannot be read" in problem]


@pytest.mark.parametrize("name", ["study.yaml", "verdict.json", "scores.csv"])
@pytest.mark.parametrize("content", [b"", b"{: [", b"\xff\xfe\x00"], ids=["empty", "broken", "not_text"])
def test_a_broken_file_of_the_study_does_not_stop_the_reading(folder, name, content):
    (folder / name).write_bytes(content)
    study = read_study(folder)
    assert set(study.arms) == set(ARMS)
    assert len(study.configs) == 2
    assert [problem for problem in study.problems if problem.startswith(f"{name} cannot be read")]


def test_scores_come_from_the_trials_while_there_is_no_scores_csv(folder):
    whole = read_study(folder).scores
    (folder / "scores.csv").unlink()
    parts = read_study(folder).scores
    key = ["arm", "seed", "split", "scorer", "prompt_id"]
    assert parts.sort_values(key)["score"].tolist() == whole.sort_values(key)["score"].tolist()


def test_names_that_look_like_missing_values_or_numbers_stay_names(folder):
    text = (folder / "scores.csv").read_text().splitlines()
    write_text(folder / "scores.csv", "\n".join([text[0], "NA,null,0,golden,007,checks,1.0,,,,,confirm,"]) + "\n")
    row = read_study(folder).scores.iloc[0]
    assert (row["arm"], row["config"], row["prompt_id"]) == ("NA", "null", "007")


def test_configs_that_were_not_confirmed_do_not_stand_for_their_arm(folder):
    """A selection trains several configs; golden scores of the selected one alone exist."""
    extra = folder / "trials" / "0000select"
    shutil.copytree(trial_of(folder, "dpo", 0), extra)
    manifest = json.loads((extra / "manifest.json").read_text())
    write_json(extra / "manifest.json", manifest | {"config": "beta=0.5", "trial_id": "0000select"})
    study = read_study(folder)
    assert len(study.trials) == 7
    assert [(c.arm, c.label) for c in study.configs] == [(arm, LABELS[arm]) for arm in ARMS]


def test_dev_is_shown_only_while_there_is_nothing_golden(folder):
    for path in [*folder.glob("trials/*/*.jsonl"), *folder.glob("base/*.jsonl")]:
        kept = [line for line in path.read_text().splitlines(keepends=True) if '"split": "golden"' not in line]
        write_text(path, "".join(kept))
    (folder / "scores.csv").unlink()
    study = read_study(folder)
    assert study.split == "dev"
    assert len(study.configs) == 2


def test_a_wrong_folder_is_refused_with_the_studies_that_it_holds(folder, tmp_path):
    with pytest.raises(UsageError, match=r"no such folder; give the folder of a study"):
        read_study(tmp_path / "absent")
    with pytest.raises(UsageError, match=r"not a study \(it holds none of study.yaml.*give one of them: letters"):
        read_study(tmp_path)
    empty = tmp_path / "letters" / "figures"
    empty.mkdir()
    with pytest.raises(UsageError, match="not a study"):
        read_study(empty)


def test_a_folder_with_scores_alone_is_a_study(folder, tmp_path):
    alone = tmp_path / "foreign"
    alone.mkdir()
    shutil.copy(folder / "scores.csv", alone)
    study = read_study(alone)
    assert study.arms == ("simpo", "dpo")
    assert (study.trials, study.base, study.verdict) == ((), None, {})
    assert [(config.arm, config.label, config.trials) for config in study.configs] == [
        (arm, LABELS[arm], ()) for arm in ARMS
    ]
