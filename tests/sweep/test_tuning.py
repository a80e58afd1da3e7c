"""The protocol: tune on dev with tuning seeds, confirm with fresh ones, look at golden once, for what was selected."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import yaml

import harness.sweep.app
from harness.data.inputs import Inputs
from harness.decide.study import decide_study
from harness.study.decision import edge_warnings, golden_problem, read_selection
from harness.study.errors import UsageError
from harness.study.files import read_json, read_jsonl
from harness.study.registration import read_study
from harness.sweep.app import run_sweep
from harness.sweep.protocol import StudyResult
from harness.sweep.tuning import dev_means, select
from tests.conftest import SMALL, overriding

GRID = [
    *("arms.dpo.learning_rate=1e-4,3e-4,1", "arms.simpo.learning_rate=1e-4,3e-4,1"),
    *("seed=1,2", "tuning_seeds=[7,8]", "train.epochs=4"),
]


def sweep(results: Path, *arguments: str) -> list[StudyResult]:
    return run_sweep(overriding(SMALL, "+method=simpo,dpo", f"results_dir={results}", *arguments))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory) -> tuple[StudyResult, Path]:
    """A grid of three learning rates an arm, of which the last ruins the model; tests that change it work on copies."""
    results = tmp_path_factory.mktemp("tuning")
    (result,) = sweep(results, *GRID, "study=grid")
    return result, results / "grid"


@pytest.fixture
def study(tuned, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tuned[1], tmp_path / "grid"))


def runs(study: Path, split: str) -> pd.DataFrame:
    scores = pd.read_csv(study / "scores.csv", keep_default_na=False)
    return scores[(scores["split"] == split) & (scores["arm"] != "sft")]


@pytest.mark.slow
def test_every_stage_runs_the_trials_that_it_should(tuned) -> None:
    """Three configs x two arms x two tuning seeds on dev; one config x two arms x two fresh seeds on golden."""
    result, study = tuned
    assert result.stages == {"base": 1, "tune": 12, "confirm": 4, "costs": 0}
    assert result.launched == 17
    dev, golden = runs(study, "dev"), runs(study, "golden")
    assert set(dev["seed"]) == {7, 8}
    assert set(golden["seed"]) == {1, 2}
    assert dev.groupby("arm")["config"].nunique().tolist() == [3, 3]
    assert golden.groupby("arm")["config"].nunique().tolist() == [1, 1]
    assert (set(dev["stage"]), set(golden["stage"])) == ({"select"}, {"confirm"})


@pytest.mark.slow
def test_the_selected_config_has_the_best_dev_mean_and_decides(tuned) -> None:
    result, study = tuned
    dev = runs(study, "dev")
    dev = dev[dev["scorer"] == "checks"]
    means = pd.to_numeric(dev["score"]).groupby([dev["arm"], dev["config"]]).mean()
    assert result.verdict is not None
    for arm, selected in result.verdict["configs"].items():
        assert means[arm][selected] == means[arm].max()
        assert read_selection(study)["arms"][arm]["selected"] == selected
        assert read_selection(study)["arms"][arm]["dev_means"] == pytest.approx(means[arm].to_dict())
    assert result.verdict["n_seeds"] == {"simpo": 2, "dpo": 2}


@pytest.mark.slow
def test_golden_is_looked_at_once(tuned) -> None:
    _, study = tuned
    (look,) = read_jsonl(study / "ledger.jsonl")
    assert look["seeds"] == {"simpo": [1, 2], "dpo": [1, 2]}
    assert not any("looked at" in warning for warning in read_json(study / "verdict.json")["warnings"])


@pytest.mark.slow
def test_a_collapsed_config_is_counted_scored_as_worst_and_never_selected(tuned) -> None:
    _, study = tuned
    manifests = [read_json(path) for path in study.glob("trials/*/manifest.json")]
    ruined = [m for m in manifests if m["config"].endswith("lr=1")]
    assert len(ruined) == 4
    assert all(m["flags"] in (["collapsed"], ["diverged"]) for m in ruined), [m["flags"] for m in ruined]
    dev = runs(study, "dev")
    assert (pd.to_numeric(dev[dev["config"].str.endswith("lr=1")]["score"]) == 0).all()
    for found in read_selection(study)["arms"].values():
        assert not found["selected"].endswith("lr=1")
        assert sum(mean == 0 for mean in found["dev_means"].values()) == 1


@pytest.mark.slow
def test_the_same_command_again_runs_nothing_and_changes_nothing(tuned) -> None:
    _, study = tuned
    before = {path: path.read_bytes() for path in study.rglob("*") if path.is_file()}
    (again,) = sweep(study.parent, *GRID, "study=grid")
    assert again.launched == 0
    assert {path: path.read_bytes() for path in study.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_more_configs_after_golden_was_scored_are_refused(tuned) -> None:
    wider = ["arms.dpo.learning_rate=1e-4,3e-4,1e-3", "arms.simpo.learning_rate=1e-4,3e-4,1e-3", *GRID[2:]]
    with pytest.raises(UsageError, match=r"golden was scored in this study already, and this command adds .*lr=0\.001"):
        sweep(tuned[1].parent, *wider, "study=grid")
    with pytest.raises(UsageError, match="tuning seed 9"):
        sweep(tuned[1].parent, *GRID[:3], GRID[4], "tuning_seeds=[7,8,9]", "study=grid")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["seed=3", "method.learning_rate=1e-4"], "golden is scored for selected configs only"),
        (["seed=7", "method.learning_rate=3e-4"], "golden is for fresh seeds: 1, 2"),
    ],
)
def test_golden_is_refused_to_a_single_trial_that_was_not_selected_or_that_tuned(
    keys: list[str], words: str, study: Path, capsys
) -> None:
    selected = read_selection(study)["arms"]["dpo"]["selected"]
    rate = "1e-4" if selected.endswith("lr=0.0003") else "3e-4"
    keys = [f"method.learning_rate={rate}" if key.startswith("method") and "seed=3" in keys else key for key in keys]
    arguments = overriding(SMALL, "+method=dpo", f"results_dir={study.parent}", "study=grid", *GRID[3:], *keys)
    assert harness.sweep.app.run_single(arguments) == 2
    assert words in capsys.readouterr().err


@pytest.mark.slow
def test_golden_scores_of_an_unselected_config_do_not_decide(study: Path) -> None:
    """Somebody has answered golden with another config by hand: the decision names it and stops."""
    scores = pd.read_csv(study / "scores.csv", keep_default_na=False)
    selected = read_selection(study)["arms"]["dpo"]["selected"]
    other = next(c for c in read_study(study / "study.yaml")["configs"]["dpo"] if c != selected)
    golden = scores[(scores["split"] == "golden") & (scores["arm"] == "dpo")]
    pd.concat([scores, golden.assign(config=other)]).to_csv(study / "scores.csv", index=False)
    with pytest.raises(UsageError, match="golden is scored for selected configs only"):
        decide_study(study)


@pytest.mark.slow
def test_golden_scores_of_a_run_that_nobody_registered_do_not_decide(study: Path) -> None:
    """Copied from a study on the same base and data: everything fits but the registration."""
    scores = pd.read_csv(study / "scores.csv", keep_default_na=False)
    golden = scores[(scores["split"] == "golden") & (scores["arm"] == "dpo")]
    first = golden[golden["seed"] == golden["seed"].min()]
    pd.concat([scores, first.assign(seed=99)]).to_csv(study / "scores.csv", index=False)
    with pytest.raises(UsageError, match=r"dpo .* seed 99 is on golden and was not registered"):
        decide_study(study)


@pytest.mark.slow
@pytest.mark.parametrize("change", [{"margin": 0.5}, {"metric": "checks_fraction"}, {"question": "Which is cheaper?"}])
def test_a_study_that_was_changed_by_hand_is_refused(change: dict, study: Path) -> None:
    path = study / "study.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | change))
    with pytest.raises(UsageError, match="was changed after it was registered"):
        decide_study(study)
    with pytest.raises(UsageError, match="was changed after it was registered"):
        sweep(study.parent, *GRID, "study=grid")


@pytest.mark.slow
def test_a_lost_selection_is_made_again_from_dev_and_a_damaged_one_is_refused(study: Path) -> None:
    before = read_selection(study)["arms"]
    (study / "selection.json").write_text("{")  # the beginning of what it was: put back from its backup copy
    sweep(study.parent, *GRID, "study=grid")
    assert read_selection(study)["arms"] == before
    (study / "selection.json").write_text("[")
    with pytest.raises(UsageError, match="put it back as it was"):
        sweep(study.parent, *GRID, "study=grid")
    (study / "selection.json").unlink()
    sweep(study.parent, *GRID, "study=grid")
    assert read_selection(study)["arms"] == before


def test_seeds_that_tune_do_not_decide() -> None:
    with pytest.raises(UsageError, match=r"seed=1,7 tuning_seeds=\[7,8\]: 7 would tune and decide"):
        sweep(Path("results"), *GRID[:2], "seed=1,7", "tuning_seeds=[7,8]", "plan=true")


def test_a_config_that_is_best_on_golden_and_poor_on_dev_is_not_selected(tmp_path: Path) -> None:
    """Planted: config b wins on golden and with a seed that did not tune, config a on dev with the tuning seeds."""
    rows = [
        {"arm": "dpo", "config": config, "seed": seed, "split": split, "prompt_id": "p", "scorer": "checks", "score": s}
        for config, split, seed, s in [
            ("a", "dev", 7, 0.6),
            ("a", "dev", 8, 0.5),
            ("b", "dev", 7, 0.3),
            ("b", "dev", 8, 0.3),
            ("b", "dev", 9, 1.0),
            ("a", "golden", 7, 0.1),
            ("b", "golden", 7, 1.0),
        ]
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "scores.csv", index=False)
    (tmp_path / "study.yaml").write_text(yaml.safe_dump({"metric": "checks", "arms": ["dpo"], "tuning_seeds": [7, 8]}))
    means = dev_means(tmp_path / "scores.csv", "checks", [7, 8])
    assert means == {("dpo", "a"): {7: 0.6, 8: 0.5}, ("dpo", "b"): {7: 0.3, 8: 0.3}}
    assert select(tmp_path, means, {"dpo": ["b", "a"]}) == {"dpo": "a"}
    assert read_selection(tmp_path)["arms"]["dpo"]["dev_means"] == {"b": 0.3, "a": 0.55}
    assert select(tmp_path, {}, {"dpo": ["b"]}) == {"dpo": "a"}, "a selection is not made twice"


def test_equal_configs_are_told_apart_by_their_order_and_a_half_trained_one_is_not_selected(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(yaml.safe_dump({"metric": "checks", "arms": ["dpo"], "tuning_seeds": [7, 8]}))
    means = {("dpo", "a"): {7: 0.5, 8: 0.5}, ("dpo", "b"): {7: 0.5, 8: 0.5}, ("dpo", "c"): {7: 0.9}}
    assert select(tmp_path, means, {"dpo": ["c", "b", "a"]}) == {"dpo": "b"}


def test_golden_is_open_where_nothing_is_tuned(tmp_path: Path) -> None:
    assert golden_problem(tmp_path, "dpo", "beta=0.1", 0) is None
    (tmp_path / "study.yaml").write_text(yaml.safe_dump({"metric": "checks", "arms": ["dpo"], "tuned": []}))
    assert golden_problem(tmp_path, "dpo", "beta=0.1", 0) is None


@pytest.mark.parametrize(
    ("values", "selected", "words"),
    [
        ([0.01, 0.05, 0.1], 0.01, "smallest that was tried (0.01, 0.05, 0.1)"),
        ([0.01, 0.05, 0.1], 0.01, "try 0.002 and 0.0004 too"),
        ([2, 10], 10, "try 50 and 250 too"),
        ([0.0, 0.5, 1.0], 1.0, "try 1.5 and 2 too"),
        ([0.0, 0.5, 1.0], 0.0, "it cannot be lower"),
    ],
)
def test_a_best_value_at_the_edge_of_its_grid_names_the_next_ones(values, selected, words: str) -> None:
    (warning,) = edge_warnings([f"beta={value:g},lr=1" for value in values], f"beta={selected:g},lr=1")
    assert words in warning


def test_a_best_value_inside_its_grid_is_not_flagged() -> None:
    assert edge_warnings(["beta=1", "beta=2", "beta=3"], "beta=2") == []


@pytest.mark.slow
def test_halving_gives_up_the_worse_half_from_seed_to_seed(tmp_path: Path) -> None:
    grid = ["arms.dpo.learning_rate=1e-4,2e-4,3e-4,1", "arms.simpo.beta=2,3", "allow_unequal_budgets=true"]
    (result,) = sweep(tmp_path, *grid, "seed=1", "tuning_seeds=[7,8,9]", "search.keep=0.5", "study=s")
    assert result.stages["tune"] == (4 + 2 + 1) + (2 + 1 + 1)
    seeds = {arm: found["seeds"] for arm, found in read_selection(tmp_path / "s")["arms"].items()}
    assert {arm: sorted(found.values()) for arm, found in seeds.items()} == {"dpo": [1, 1, 2, 3], "simpo": [1, 3]}
    for found in read_selection(tmp_path / "s")["arms"].values():
        assert found["seeds"][found["selected"]] == 3


@pytest.mark.slow
def test_optuna_suggests_equally_many_configs_for_each_arm_and_the_same_ones_again(tmp_path: Path) -> None:
    keys = [
        "arms.dpo.learning_rate={low: 1e-5, high: 1e-3, log: true}",
        "arms.simpo.learning_rate={low: 1e-5, high: 1e-3, log: true}",
        *("seed=1", "tuning_seeds=[7]", "search.sampler=tpe", "search.trials=2", "search.batch=1", "study=s"),
    ]
    (result,) = sweep(tmp_path, *keys)
    assert result.stages["tune"] == 4
    assert {arm: len(found) for arm, found in read_study(tmp_path / "s" / "study.yaml")["configs"].items()} == {
        "simpo": 2,
        "dpo": 2,
    }
    (again,) = sweep(tmp_path, *keys)
    assert again.launched == 0


@pytest.mark.slow
def test_a_tuning_trial_that_fails_stops_before_golden(tmp_path: Path, monkeypatch) -> None:
    real = Inputs.splits

    def lost(inputs, config):
        if config.method.learning_rate == 3e-4 and config.method.name == "dpo":
            raise OSError("the disk is gone")
        return real(inputs, config)

    monkeypatch.setattr(Inputs, "splits", lost)
    grid = ["arms.dpo.learning_rate=1e-4,3e-4", "arms.simpo.learning_rate=1e-4,3e-4", "tuning_seeds=[7]", "seed=1"]
    (result,) = sweep(tmp_path, *grid, "study=s")
    assert result.verdict is None
    assert "1 of 4 tuning trials failed" in result.undecided
    assert runs(tmp_path / "s", "golden").empty
    assert not (tmp_path / "s" / "ledger.jsonl").exists()
    monkeypatch.undo()
    (mended,) = sweep(tmp_path, *grid, "study=s")
    assert mended.launched == 3
    assert mended.verdict is not None


@pytest.mark.slow
def test_registered_looks_end_the_study_at_the_first_decision(tmp_path: Path) -> None:
    """DPO at a rate that ruins it loses at the first look; the seeds of the second one are not trained."""
    keys = ["arms.dpo.learning_rate=1", "seed=1,2,3,4", "decide.looks=[2,4]", "study=s", "data.max_golden_prompts=60"]
    (result,) = sweep(tmp_path, *keys)
    assert result.verdict is not None
    assert result.verdict["verdict"] == "simpo"
    assert result.verdict["look"] == {"seeds": 2, "registered": [2, 4], "alpha": 0.05}
    assert result.verdict["alpha"] == 0.025
    assert result.stages["confirm"] == 4
    assert not any("looked at" in w or "has no scores" in w for w in result.verdict["warnings"])
    (again,) = sweep(tmp_path, *keys)
    assert again.launched == 0


@pytest.mark.slow
def test_an_undecided_look_goes_on_to_the_next_without_a_warning(tmp_path: Path) -> None:
    """Two equal arms over few prompts are neither a tie nor a win."""
    (result,) = sweep(tmp_path, "seed=1,2,3", "decide.looks=[2,3]", "study=s", "decide.margin=0.001")
    assert result.verdict is not None
    assert result.verdict["verdict"] == "inconclusive"
    assert result.verdict["look"]["seeds"] == 3
    assert len(list(read_jsonl(tmp_path / "s" / "ledger.jsonl"))) == 2
    assert not any("looked at" in warning for warning in result.verdict["warnings"])


@pytest.mark.parametrize("looks", ["[3,2]", "[2]", "[2,4]"])
def test_looks_that_do_not_end_with_all_seeds_are_refused(looks: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"numbers of seeds in rising order, the last one all 3 seeds"):
        sweep(tmp_path, "seed=1,2,3", f"decide.looks={looks}")


@pytest.mark.slow
def test_a_family_is_one_study_for_each_value(tmp_path: Path) -> None:
    results = sweep(
        tmp_path,
        "seed=1",
        "study=noise",
        "family.key=data.label_noise",
        "family.values=[0.0,0.5]",
        "data.max_dev_prompts=4",
    )
    assert len(results) == 2
    studies = {path.name: read_study(path / "study.yaml") for path in tmp_path.iterdir() if path.name != ".cache"}
    assert set(studies) == {"noise-label_noise-0", "noise-label_noise-0.5"}
    assert {s["family"]["value"]: s["family"]["name"] for s in studies.values()} == {
        0.0: "noise-label_noise",
        0.5: "noise-label_noise",
    }
    sweep(tmp_path, "seed=1", "study=noise-label_noise-0.5", "data.label_noise=0.5", "data.max_dev_prompts=4")
    again = read_study(tmp_path / "noise-label_noise-0.5" / "study.yaml")
    assert again["family"] == studies["noise-label_noise-0.5"]["family"], "one level alone stays in its family"
    for name in studies:
        report = (tmp_path / name / "report.md").read_text()
        assert "label\\_noise=0 " in report
        assert "label\\_noise=0.5 " in report
    flipped = {
        name: {read_json(path)["label_noise"]["flipped"] for path in (tmp_path / name).glob("trials/*/manifest.json")}
        for name in studies
    }
    assert flipped == {"noise-label_noise-0": {0}, "noise-label_noise-0.5": {8}}


@pytest.mark.slow
def test_costs_are_measured_with_every_way_to_the_reference(tmp_path: Path) -> None:
    sweep(tmp_path, "seed=1", "study=s", "measure_costs=true")
    found = {path.parent.name: read_json(path) for path in (tmp_path / "s" / "costs").glob("*/manifest.json")}
    assert set(found) == {"simpo", "dpo-cached", "dpo-adapter_off", "dpo-separate"}
    losses = {}
    for name, manifest in found.items():
        assert manifest["seconds"]["train"] > 0
        assert manifest["peak_memory_bytes"]["train"] > 50_000_000
        assert "golden" not in manifest["done"]
        rows = [json.loads(line) for line in (tmp_path / "s" / "costs" / name / "train.jsonl").read_text().splitlines()]
        losses[name] = [row["loss"] for row in rows]
    assert losses["dpo-adapter_off"] == pytest.approx(losses["dpo-cached"], rel=1e-5)
    assert losses["dpo-separate"] == pytest.approx(losses["dpo-cached"], rel=1e-5)
    assert {name: manifest["reference"] for name, manifest in found.items() if name != "simpo"} == {
        "dpo-cached": "cached",
        "dpo-adapter_off": "adapter_off",
        "dpo-separate": "separate",
    }
