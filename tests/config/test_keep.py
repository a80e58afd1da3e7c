"""Whose weights stay on disk, and that nothing else changes: `keep=all`, `confirmed`, `none`."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from harness.study.errors import UsageError
from harness.study.manifest import read_manifest
from harness.sweep.app import print_result, run_sweep
from harness.sweep.problems import compose_run, load_run
from harness.verify import verify_study
from tests.conftest import SMALL, run_one

STUDY = [
    *SMALL, "+method=simpo,dpo", "study=s", "arms.dpo.beta=0.05,0.1", "arms.simpo.beta=2,3", "tuning_seeds=[7]", "seed=1",
]  # fmt: skip


def sweep(results: Path, *more: str):
    return run_sweep([*STUDY, f"results_dir={results}", *more])[0]


@pytest.fixture(scope="module")
def studies(tmp_path_factory) -> dict[str, Path]:
    found = {}
    for keep in ("all", "confirmed", "none"):
        results = tmp_path_factory.mktemp(keep)
        assert print_result(sweep(results, f"keep={keep}")) == 0
        found[keep] = results / "s"
    return found


def with_weights(study: Path) -> dict[str, list[int]]:
    """Return the seeds of the trials by whether they have their weights."""
    found: dict[str, list[int]] = {"kept": [], "deleted": []}
    for folder in sorted((study / "trials").iterdir()):
        found["kept" if (folder / "adapter").is_dir() else "deleted"].append(read_manifest(folder)["seed"])
    return {name: sorted(seeds) for name, seeds in found.items()}


@pytest.mark.slow
def test_each_policy_keeps_the_weights_that_it_says(studies) -> None:
    assert with_weights(studies["all"]) == {"kept": [1, 1, 7, 7, 7, 7], "deleted": []}
    assert with_weights(studies["confirmed"]) == {"kept": [1, 1], "deleted": [7, 7, 7, 7]}
    assert with_weights(studies["none"]) == {"kept": [], "deleted": [1, 1, 7, 7, 7, 7]}


@pytest.mark.slow
def test_scores_and_verdict_are_the_same_and_the_study_is_whole(studies) -> None:
    for keep in ("confirmed", "none"):
        for name in ("scores.csv", "verdict.json"):
            assert (studies[keep] / name).read_text() == (studies["all"] / name).read_text()
        assert verify_study(studies[keep]) == []
        again = sweep(studies[keep].parent, f"keep={keep}")
        assert (again.launched, print_result(again)) == (0, 0)


@pytest.mark.slow
def test_what_needs_weights_that_are_gone_trains_them_again(studies) -> None:
    """A tuned trial that is asked for golden by hand; its training and its answers on dev come out as before."""
    study = studies["none"]
    tuned = next(f for f in sorted((study / "trials").iterdir()) if read_manifest(f)["seed"] == 1)
    before, config = read_manifest(tuned), yaml.safe_load((tuned / "config.yaml").read_text())
    (tuned / "completions.jsonl").unlink()
    again = sweep(study.parent, "keep=none")
    assert (again.launched, print_result(again)) == (1, 0)
    after = read_manifest(tuned)
    assert after["consumed_tokens_sha256"] == before["consumed_tokens_sha256"]
    assert {**after["files"], "config.yaml": {}} == {**before["files"], "config.yaml": {}}
    config["decide"]["metric"] = "checks"  # registered since, and left out of the command
    assert yaml.safe_load((tuned / "config.yaml").read_text()) == config
    assert (study / "scores.csv").read_text() == (studies["all"] / "scores.csv").read_text()


def test_benchmarks_need_weights_and_say_so() -> None:
    with pytest.raises(UsageError, match=r"keep=none: score.lm_eval.tasks .* use keep=confirmed"):
        load_run(["+method=dpo", "keep=none", "score.lm_eval.tasks=[gsm8k]"])


def test_a_trial_by_hand_keeps_what_it_is_told_to(tmp_path: Path) -> None:
    given = [*SMALL, "study=s", f"results_dir={tmp_path}"]
    run_one(compose_run([*given, "+method=sft", "seed=0"]), ("dev",))
    assert run_one(compose_run([*given, "+method=dpo", "seed=1", "keep=none"]), ("dev",)).status == "complete"
    folder = next((tmp_path / "s" / "trials").iterdir())
    assert not (folder / "adapter").exists()
    assert read_manifest(folder)["weights_deleted"] == "none"
