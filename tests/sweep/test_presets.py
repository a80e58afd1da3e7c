"""The named sweeps: each composes, plans and gives every arm the same budget; those for W&B agents make our commands."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

from harness.config.overrides import check_overrides, check_single
from harness.config.paths import SWEEPS
from harness.config.schema import EMBEDDED
from harness.sweep.app import run_sweep
from harness.sweep.problems import compose_run

PRESETS = {path.stem: yaml.safe_load(path.read_text()) for path in sorted(SWEEPS.glob("*.yaml"))}


def plan(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    """Return the trials that a preset plans, as printed."""
    assert run_sweep([f"+sweep={name}", "plan=true", f"results_dir={folder}"]) == []
    lines = capsys.readouterr().out.splitlines()
    return [line.split() for line in lines if " tune " in line or " confirm " in line]


def test_the_presets_are_those_that_the_readme_names() -> None:
    readme = (SWEEPS.parent / "README.md").read_text()
    assert set(PRESETS) == {
        *("smoke", "gamma_beta", "full", "noise", "ablation"),
        *("paper_mistral_base", "paper_llama3_instruct", "paper_gemma2"),
    }
    assert all(f"`{name}`" in readme for name in PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_plans_equally_many_trials_for_each_arm(name: str, tmp_path: Path, capsys) -> None:
    trials = plan(name, tmp_path, capsys)
    if name == "gamma_beta":
        _is_twelve_configs_an_arm_over_two_seeds_and_five_fresh_ones(trials)
    arms = set(PRESETS[name]["arms"])
    for stage in ("tune", "confirm"):
        counts = {arm: sum(row[1] == stage and row[2] == arm for row in trials) for arm in arms}
        assert len(set(counts.values())) == 1, f"{stage}: {counts}"
    assert any(row[1] == "confirm" for row in trials)
    assert not list(tmp_path.iterdir())


def _is_twelve_configs_an_arm_over_two_seeds_and_five_fresh_ones(trials: list[list[str]]) -> None:
    tune, confirm = ([row for row in trials if row[1] == stage] for stage in ("tune", "confirm"))
    assert len(tune) == 2 * 12 * 2
    assert len({row[0] for row in tune}) == 48, "no trial is planned twice"
    assert {row[3] for row in tune} == {"100", "101"}
    assert [row[3] for row in confirm] == ["10", "11", "12", "13", "14"] * 2


def test_the_papers_models_are_planned_without_a_connection(tmp_path: Path, capsys) -> None:
    run_sweep(["+sweep=paper_gemma2", "plan=true", f"results_dir={tmp_path}"])
    said = capsys.readouterr().out
    assert "ids and sizes are not known here" in said
    assert "beta=10,gamma_beta_ratio=0.5,lr=8e-07" in said
    assert "beta=0.01,lr=5e-07" in said


@pytest.mark.parametrize(
    ("name", "gamma"), [("paper_mistral_base", 1.6), ("paper_llama3_instruct", 1.375), ("paper_gemma2", 5.0)]
)
def test_the_papers_gammas(name: str, gamma: float) -> None:
    """SimPO paper, table of hyperparameters: gamma is beta times the ratio."""
    space = PRESETS[name]["arms"]["simpo"]
    assert space["beta"][0] * space["gamma_beta_ratio"][0] == pytest.approx(gamma)
    assert PRESETS[name]["arms"]["dpo"]["beta"] == [0.01]


def test_the_presets_on_the_embedded_study_name_no_model() -> None:
    assert {name for name, preset in PRESETS.items() if "model" not in preset} == {
        *("smoke", "gamma_beta", "full", "noise", "ablation")
    }
    assert compose_run(["+method=dpo"]).model.path == EMBEDDED


@pytest.mark.parametrize("arm", ["dpo", "simpo"])
def test_a_wandb_agent_runs_one_trial_that_golden_stays_closed_to(arm: str) -> None:
    sweep = yaml.safe_load((SWEEPS / "agents" / f"{arm}.yaml").read_text())
    params = {key: spec.get("value", spec.get("max")) for key, spec in sweep["parameters"].items()}
    expanded = create_sweep_command_args({"args": {key: {"value": value} for key, value in params.items()}})
    arguments = expanded["args_no_hyphens"]
    check_single(arguments)
    check_overrides(arguments)
    config = compose_run(arguments)
    assert config.method.name == arm
    assert config.tracking.mode == "online"
    assert sweep["command"] == ["${env}", "${interpreter}", "-m", "${program}", "--dev-only", "${args_no_hyphens}"]


def test_both_wandb_sweeps_have_the_same_budget() -> None:
    runs = {yaml.safe_load((SWEEPS / "agents" / f"{arm}.yaml").read_text())["run_cap"] for arm in ("dpo", "simpo")}
    assert len(runs) == 1
