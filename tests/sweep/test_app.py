"""The main job, end to end on the embedded study: paired runs, one verdict, nothing done twice, nothing finished lost."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

import harness.train.logps
from harness.decide.study import decide_study
from harness.report.page import render_report
from harness.score.study_scores import rescore
from harness.study.errors import UsageError, WorkerDiedError
from harness.study.files import read_json, read_jsonl
from harness.study.manifest import data_identity, read_manifest, write_manifest
from harness.study.scores_csv import SCORE_COLUMNS
from harness.sweep.app import print_result, run_single, run_sweep
from harness.sweep.protocol import StudyResult
from tests.conftest import SMALL, load_base, overriding

pytestmark = pytest.mark.slow


def sweep(results: Path, *arguments: str) -> StudyResult:
    (result,) = run_sweep(overriding(SMALL, "+method=simpo,dpo", f"results_dir={results}", *arguments))
    return result


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[StudyResult, Path]:
    """A finished study of both arms with two seeds, and its folder; tests that change it work on copies."""
    results = tmp_path_factory.mktemp("sweep") / "results"
    result = sweep(results, "seed=0,1", "study=small")
    return result, results / "small"


def manifests(study: Path) -> list[dict]:
    return [read_json(path) for path in sorted(study.glob("trials/*/manifest.json"))]


def test_a_sweep_ends_with_a_verdict_a_report_and_every_file(finished) -> None:
    result, study = finished
    assert [outcome.status for outcome in result.outcomes] == ["complete"] * 5
    assert result.launched == 5
    assert result.verdict is not None
    assert result.verdict["n_seeds"] == {"simpo": 2, "dpo": 2}
    assert result.report.is_file()
    assert (study / "report.md").is_file()
    for folder in [study / "base", *study.glob("trials/*")]:
        names = {"config.yaml", "manifest.json", "completions.jsonl", "pairs.jsonl", "scores.jsonl"}
        assert names <= {path.name for path in folder.iterdir()}
    for folder in study.glob("trials/*"):
        assert (folder / "adapter" / "adapter_model.safetensors").is_file()
        assert len(list(read_jsonl(folder / "train.jsonl"))) == 4
        assert not (folder / "checkpoints").exists()


def test_scores_are_in_long_form_for_arms_and_base(finished) -> None:
    scores = pd.read_csv(finished[1] / "scores.csv", keep_default_na=False)
    assert tuple(scores.columns) == SCORE_COLUMNS
    assert set(scores["arm"]) == {"sft", "simpo", "dpo"}
    golden = scores[(scores["split"] == "golden") & (scores["scorer"] == "checks")]
    assert golden.groupby(["arm", "seed"])["prompt_id"].nunique().tolist() == [24] * 5
    assert set(scores[scores["split"] == "dev"]["scorer"]) >= {"checks", "preference_accuracy_sum"}


def test_a_manifest_says_what_a_trial_was_and_what_it_cost(finished) -> None:
    for manifest in manifests(finished[1]):
        assert manifest["status"] == "complete"
        assert manifest["method"]["name"] == manifest["arm"]
        assert {"load", "train", "generate", "heldout", "score"} <= set(manifest["seconds"])
        assert manifest["peak_memory_bytes"]["train"] > 10_000_000
        assert manifest["tokens"]["train"] > 0
        assert manifest["tokens"]["generated"] > 0
        assert manifest["versions"]["trl"].startswith("1.16")
        assert manifest["hardware"]["cores"] >= 1
        assert manifest["parameters"]["trainable"] < manifest["parameters"]["total"]


def test_both_arms_saw_the_same_tokens_seed_by_seed(finished) -> None:
    study = finished[1]
    identity = data_identity(study)
    assert identity["status"] == "proved"
    for seed in ("0", "1"):
        assert identity["by_seed"][seed]["simpo"] == identity["by_seed"][seed]["dpo"]
    assert identity["by_seed"]["0"] != identity["by_seed"]["1"]
    for manifest in manifests(study):
        assert manifest["consumed_tokens_sha256"] == manifest["expected_tokens_sha256"]
    assert "proved" in (study / "report.md").read_text()


def copied(study: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(study, tmp_path / "copy"))


def test_an_arm_fed_in_another_order_loses_the_claim_of_identical_data(finished, tmp_path: Path) -> None:
    """The arm is really trained in another order: its own trainer's hash is what refutes the claim."""
    from harness.data.inputs import Inputs
    from harness.data.plan import BatchPlan
    from harness.train.memory import plan_of

    study = copied(finished[1], tmp_path)
    folder = next(path.parent for path in study.glob("trials/*/manifest.json") if read_json(path)["arm"] == "dpo")
    config = harness.sweep.app.compose_run(["+method=simpo", *SMALL])
    tokens = Inputs().tokens(config)
    plan = plan_of(config, tokens.train.rows)
    other = BatchPlan(plan.order[::-1], plan.batch_size, plan.micro_batch_size)
    (tmp_path / "train").mkdir()
    result = harness.train.run.train_arm(
        config, tokens.train.rows, other, model=load_base(config), chat=tokens.chat, folder=tmp_path / "train"
    )
    write_manifest(folder, read_manifest(folder) | {"consumed_tokens_sha256": result.consumed_tokens_sha256})
    assert any("identical data is NOT proved" in warning for warning in decide_study(study)["warnings"])
    render_report(study)
    for page in ("report.html", "report.md"):
        assert re.search(r"not proved", (study / page).read_text(), re.IGNORECASE)


def test_the_same_command_again_trains_nothing_and_changes_nothing(finished) -> None:
    result, study = finished
    before = {path: path.read_bytes() for path in study.rglob("*") if path.is_file()}
    code = (
        "import sys\nfrom harness.sweep.app import run_sweep\n"
        f"result = run_sweep({['+method=simpo,dpo', *SMALL, f'results_dir={study.parent}', 'seed=0,1', 'study=small']!r})\n"
        "print(result[0].launched, 'torch' in sys.modules)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split()[-2:] == ["0", "False"]
    after = {path: path.read_bytes() for path in study.rglob("*") if path.is_file()}
    assert after.keys() == before.keys()
    assert [path.name for path in after if after[path] != before[path]] == []
    assert result.verdict == read_json(study / "verdict.json")


@pytest.mark.parametrize("damage", ["deleted", "truncated"])
@pytest.mark.parametrize("name", ["scores.jsonl", "completions.jsonl", "pairs.jsonl", "manifest.json"])
def test_a_damaged_file_is_made_again_and_nothing_else(name: str, damage: str, finished, tmp_path: Path) -> None:
    study = copied(finished[1], tmp_path)
    before = (study / "scores.csv").read_bytes()
    path = next(study.glob(f"trials/*/{name}"))
    if damage == "deleted":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    result = sweep(study.parent, "seed=0,1", f"study={study.name}")
    assert result.launched == 1
    assert [outcome.status for outcome in result.outcomes] == ["complete"] * 5
    assert (study / "scores.csv").read_bytes() == before
    assert len(list(read_jsonl(path.parent / "completions.jsonl"))) == 36


def add_a_digit(path: Path) -> None:
    path.write_text(path.read_text().replace('"trainable": ', '"trainable": 1', 1))


def test_a_manifest_that_was_changed_is_not_believed_and_its_trial_runs_again(finished, tmp_path: Path) -> None:
    study = copied(finished[1], tmp_path)
    before = (study / "scores.csv").read_bytes()
    path = next(study.glob("trials/*/manifest.json"))
    add_a_digit(path)
    changed = f"manifest of trial {path.parent.name} was changed after the trial wrote it"
    assert any(changed in warning for warning in decide_study(study)["warnings"])
    with pytest.raises(UsageError, match="was changed since its trial wrote it; run the sweep's command again"):
        rescore(study, ["checks"])
    result = sweep(study.parent, "seed=0,1", f"study={study.name}")
    assert result.launched == 1
    assert (study / "scores.csv").read_bytes() == before
    assert not any(changed in warning for warning in result.verdict["warnings"])


def test_another_question_on_a_registered_study_is_refused(finished) -> None:
    results = finished[1].parent
    with pytest.raises(UsageError, match=r"margin: registered 0\.05, now 0\.01") as error:
        sweep(results, "seed=0,1", "study=small", "decide.margin=0.01")
    assert "study of its own" in str(error.value)
    with pytest.raises(UsageError, match=r"contents\.train"):
        sweep(results, "seed=0,1", "study=small", "data.path=" + str(_pairs_file(results)))


def _pairs_file(folder: Path) -> Path:
    path = folder / "pairs.jsonl"
    rows = [{"prompt": f"question {i}", "chosen": "yes", "rejected": "no"} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_plan_prints_the_trials_and_runs_nothing(tmp_path: Path, capsys) -> None:
    arguments = [
        "+method=simpo,dpo",
        f"results_dir={tmp_path}",
        "arms.dpo.beta=0.1,0.5",
        "arms.simpo.beta=2,10",
        "seed=1,2,3",
    ]
    assert run_sweep([*arguments, "plan=true"]) == []
    lines = capsys.readouterr().out.splitlines()
    assert "8 trials to tune (simpo 2, dpo 2 configs x 2 seeds, on dev), 6 to confirm" in lines[0]
    assert re.search(r"each trial: \d+ pairs x \d+ epochs = \d+ steps", lines[1])
    trials = [line.split() for line in lines if " tune " in line or " confirm " in line]
    assert len({line[0] for line in trials if line[1] == "tune"}) == 8
    assert [(line[2], line[3]) for line in trials if line[1] == "confirm"] == [
        (arm, seed) for arm in ("simpo", "dpo") for seed in ("1", "2", "3")
    ]
    assert list(tmp_path.iterdir()) == []


def test_unequal_budgets_are_refused_unless_allowed(tmp_path: Path, capsys) -> None:
    arguments = ["+method=simpo,dpo", f"results_dir={tmp_path}", "arms.simpo.beta=2,4,10", "plan=true"]
    with pytest.raises(UsageError, match=r"unequal budgets \(simpo: 3, dpo: 1 configs\)"):
        run_sweep(arguments)
    run_sweep([*arguments, "allow_unequal_budgets=true", "seed=0"])
    assert "6 trials to tune (simpo 3 configs x 2 seeds, on dev), 2 to confirm" in capsys.readouterr().out


def test_a_shared_key_goes_to_every_arm_and_a_bad_value_of_any_trial_stops_all(tmp_path: Path, capsys) -> None:
    run_sweep(["+method=simpo,dpo", f"results_dir={tmp_path}", "method.learning_rate=2e-4", "seed=0", "plan=true"])
    assert capsys.readouterr().out.count("lr=0.0002") == 2
    with pytest.raises(UsageError, match=r"arms\.dpo\.beta=-1"):
        run_sweep(["+method=simpo,dpo", f"results_dir={tmp_path}", "arms.dpo.beta=-1", "plan=true"])


def test_a_failed_trial_is_named_kept_apart_and_run_again_where_that_is_asked_for(
    tmp_path: Path, monkeypatch, capsys
) -> None:
    real = harness.train.run.train_arm

    def fail(config, *args, **kwargs):
        if config.method.name == "dpo":
            raise RuntimeError("an odd model")
        return real(config, *args, **kwargs)

    monkeypatch.setattr("harness.train.run.train_arm", fail)
    failed = sweep(tmp_path, "seed=0", "study=s")
    assert print_result(failed) == 1
    said = capsys.readouterr().out
    assert "failed: dpo" in said
    assert "train: RuntimeError: an odd model" in said
    failure = read_json(next((tmp_path / "s").glob("trials/*/failure.json")))
    assert (failure["arm"], failure["stage"], failure["error"]) == ("dpo", "train", "RuntimeError")
    assert "Traceback" in failure["traceback"]
    assert "an odd model" in failed.report.read_text()
    assert "mend the cause, and the same command runs them again" in said
    second = sweep(tmp_path, "seed=0", "study=s")
    assert (second.launched, print_result(second)) == (1, 1)
    assert "the same command with retry_failed=true runs them again" in capsys.readouterr().out
    monkeypatch.undo()
    told = sweep(tmp_path, "seed=0", "study=s")
    assert (told.launched, print_result(told)) == (0, 1)
    said = capsys.readouterr().out
    assert "train: RuntimeError: an odd model" in said
    assert "the same command with retry_failed=true runs them again" in said
    again = sweep(tmp_path, "seed=0", "study=s", "retry_failed=true")
    assert (again.launched, print_result(again)) == (1, 0)
    assert not list((tmp_path / "s").glob("trials/*/*failure.json"))
    assert sweep(tmp_path, "seed=0", "study=s").launched == 0


class Panic(BaseException):
    """As a library in Rust panics: no Exception."""


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), WorkerDiedError("killed"), Panic("no threads")]
)
def test_what_came_from_outside_the_training_is_tried_again_by_the_same_command(
    error: BaseException, tmp_path: Path, monkeypatch
) -> None:
    real = harness.train.run.train_arm

    def fail(config, *args, **kwargs):
        if config.method.name == "dpo":
            raise error
        return real(config, *args, **kwargs)

    monkeypatch.setattr("harness.train.run.train_arm", fail)
    assert print_result(sweep(tmp_path, "seed=0", "study=s")) == 1
    monkeypatch.undo()
    again = sweep(tmp_path, "seed=0", "study=s")
    assert (again.launched, print_result(again)) == (1, 0)


def test_a_diverged_trial_scores_worst_and_is_said_so(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(
        harness.train.logps,
        "reference_logps",
        lambda pairs, *args, **kwargs: torch.full((len(pairs.rows), 2), float("nan"), dtype=torch.float64),
    )
    result = sweep(tmp_path, "seed=0", "study=s")
    assert print_result(result) == 0
    assert result.verdict is not None
    assert result.verdict["means"]["dpo"] == 0.0
    assert "dpo seed 0 diverged: scored as worst, not dropped" in capsys.readouterr().out
    diverged = next(manifest for manifest in manifests(tmp_path / "s") if manifest["arm"] == "dpo")
    assert diverged["status"] == "diverged"
    assert diverged["divergence"] == "loss is nan at step 1 of 4"
    assert sweep(tmp_path, "seed=0", "study=s").launched == 0


def test_a_learning_rate_far_too_high_collapses_the_policy_and_is_flagged(tmp_path: Path) -> None:
    result = sweep(tmp_path, "seed=0", "study=s", "method.learning_rate=0.3", "train.epochs=2")
    flags = {manifest["arm"]: [*manifest["flags"], manifest["status"]] for manifest in manifests(tmp_path / "s")}
    assert result.verdict is not None
    for arm in ("simpo", "dpo"):
        assert {"collapsed", "diverged"} & set(flags[arm])
        assert result.verdict["means"][arm] == 0.0
    assert any("scored as worst" in warning for warning in result.verdict["warnings"])


def test_label_noise_flips_training_labels_and_is_recorded(tmp_path: Path) -> None:
    result = sweep(tmp_path, "seed=0", "study=s", "data.label_noise=0.25")
    assert result.verdict is not None
    assert yaml.safe_load((tmp_path / "s" / "study.yaml").read_text())["data"]["label_noise"]["flipped"] == 4
    assert {manifest["label_noise"]["flipped"] for manifest in manifests(tmp_path / "s")} == {4}


def test_golden_prompts_in_the_training_data_are_refused_before_anything_runs(tmp_path: Path) -> None:
    row = {"prompt": "What is  it?", "chosen": "this", "rejected": "that"}
    (tmp_path / "train.jsonl").write_text(json.dumps(row | {"prompt": "what is it?"}) + "\n")
    (tmp_path / "golden.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "dev.jsonl").write_text(json.dumps(row | {"prompt": "another"}) + "\n")
    files = [f"data.{split}={tmp_path / split}.jsonl" for split in ("train", "dev", "golden")]
    with pytest.raises(UsageError, match=r"(?s)golden.*What is it\?"):
        run_sweep(["+method=simpo,dpo", f"results_dir={tmp_path / 'results'}", *files])
    assert not (tmp_path / "results").exists()


def test_a_golden_set_of_pairs_is_decided_on_both_reward_definitions(tmp_path: Path) -> None:
    from harness.config.paths import embedded_dir as study_dir

    rows = [row for row in read_jsonl(study_dir() / "dev.jsonl") if "chosen" in row]
    keep = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows]
    for split, part in (("dev", keep[:10]), ("golden", keep[10:40])):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    result = sweep(
        tmp_path,
        "seed=0",
        "study=s",
        f"data.train={study_dir() / 'train.jsonl'}",
        f"data.dev={tmp_path / 'dev.jsonl'}",
        f"data.golden={tmp_path / 'golden.jsonl'}",
    )
    assert result.verdict is not None
    assert result.verdict["metric"] == "preference_accuracy"
    scores = pd.read_csv(tmp_path / "s" / "scores.csv", keep_default_na=False)
    table = scores[scores["arm"] == "dpo"].pivot_table(
        index="prompt_id", columns="scorer", values="score", aggfunc="first"
    )
    table = table.astype(float)
    both = (table["preference_accuracy_sum"] + table["preference_accuracy_mean"]) / 2
    assert table["preference_accuracy"].tolist() == pytest.approx(both.tolist())
    assert "not the same as answering well" in (tmp_path / "s" / "report.md").read_text()


def test_one_trial_can_be_run_alone(tmp_path: Path, capsys) -> None:
    arguments = ["+method=dpo", "seed=1", *SMALL, f"results_dir={tmp_path}", "study=one"]
    assert run_single(arguments) == 0
    assert "dpo beta=0.1" in capsys.readouterr().out
    assert [manifest["seed"] for manifest in manifests(tmp_path / "one")] == [1]
    assert run_single(["+method=dpo", "train.epocs=1"]) == 2


def test_the_stock_engine_runs_the_same_study(tmp_path: Path) -> None:
    result = sweep(tmp_path, "seed=0", "study=s", "train.engine=stock")
    assert result.verdict is not None
    assert data_identity(tmp_path / "s")["status"] == "proved"
    assert {manifest["engine"] for manifest in manifests(tmp_path / "s")} == {"stock"}


def test_full_fine_tuning_saves_a_whole_model(tmp_path: Path) -> None:
    result = sweep(tmp_path, "seed=0", "study=s", "train.tuning=full")
    assert result.verdict is not None
    for manifest, folder in zip(manifests(tmp_path / "s"), sorted((tmp_path / "s").glob("trials/*")), strict=True):
        assert (folder / "model" / "model.safetensors").is_file()
        assert manifest["parameters"]["trainable"] == manifest["parameters"]["total"]
