"""What a report says of a search: every config that was tried counts, the collapsed ones too, and nothing is tested."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from harness.report.page import render_report
from harness.report.search import draw_search, expected_best, is_fair, sensitivity_table, tried_configs
from harness.report.study import read_study
from harness.report.style import looks
from harness.study.files import digest, read_json, write_json
from tests.study_fixture import build_study

RATES, BETAS, RATIOS = (1e-4, 4e-4), (2.0, 10.0), (0.3, 0.5)
LABELS = {
    "simpo": [f"beta={b:g},gamma_beta_ratio={g:g},lr={r:g}" for b, g, r in itertools.product(BETAS, RATIOS, RATES)],
    "dpo": [f"beta={b:g},lr={r:g}" for b, r in itertools.product((0.01, 0.05, 0.1, 0.5), RATES)],
}


def dev_mean(arm: str, place: int) -> float:
    """SimPO's configs are 0.40, 0.45, ... and its last one collapsed; DPO's are 0.50, 0.52, ..."""
    if arm == "simpo":
        return 0.0 if place == 7 else 0.40 + 0.05 * place
    return 0.50 + 0.02 * place


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A study whose grid of eight configs an arm was tuned with two seeds; the sixth of each arm was selected."""
    folder = build_study(tmp_path / "study")
    scores = pd.read_csv(folder / "scores.csv", keep_default_na=False)
    scores = scores[(scores["split"] == "golden") | (scores["arm"] == "sft")]
    selected = {arm: found[5] for arm, found in LABELS.items()}
    for arm, label in selected.items():
        scores.loc[scores["arm"] == arm, "config"] = label
    rows = []
    for arm, found in LABELS.items():
        for (place, label), seed in itertools.product(enumerate(found), (100, 101)):
            shift = 0.0 if dev_mean(arm, place) == 0 else 0.01 if seed == 100 else -0.01
            about = {"arm": arm, "config": label, "seed": seed, "split": "dev", "scorer": "checks", "stage": "select"}
            rows += [about | {"prompt_id": p, "score": dev_mean(arm, place) + shift} for p in ("a", "b")]
            if dev_mean(arm, place) == 0:
                path = folder / "trials" / digest([arm, label, seed])[:12]
                path.mkdir()
                manifest = {"arm": arm, "config": label, "seed": seed, "status": "complete", "flags": ["collapsed"]}
                write_json(path / "manifest.json", manifest)
    pd.concat([scores, pd.DataFrame(rows)]).to_csv(folder / "scores.csv", index=False)
    for path in folder.glob("trials/*/manifest.json"):
        manifest = read_json(path)
        if manifest["seed"] < 100:
            write_json(path, manifest | {"config": selected[manifest["arm"]]})
    settings = yaml.safe_load((folder / "study.yaml").read_text())
    settings |= {"tuned": ["simpo", "dpo"], "tuning_seeds": [100, 101], "configs": LABELS}
    settings.pop("sha256", None)
    (folder / "study.yaml").write_text(yaml.safe_dump(settings))
    arms = {arm: {"selected": label} for arm, label in selected.items()}
    write_json(folder / "selection.json", {"metric": "checks", "tuning_seeds": [100, 101], "arms": arms})
    return folder


def test_every_config_that_was_tried_is_there_with_its_mean_over_the_tuning_seeds(folder: Path) -> None:
    tried = tried_configs(read_study(folder))
    assert {arm: len(found) for arm, found in tried.items()} == {"simpo": 8, "dpo": 8}
    for arm, found in tried.items():
        by_label = {one.label: one for one in found}
        for place, label in enumerate(LABELS[arm]):
            assert by_label[label].mean == pytest.approx(dev_mean(arm, place))
            assert by_label[label].seeds == 2
            assert by_label[label].selected == (place == 5)
    assert [one.ruined for one in tried["simpo"]].count(True) == 1
    assert tried["simpo"][0].values == {"beta": 2.0, "gamma_beta_ratio": 0.3, "lr": 1e-4}
    assert is_fair(read_study(folder))


def test_the_table_by_hand(folder: Path) -> None:
    """SimPO: .40 to .70 in steps of .05, and the collapsed config with 0; its median is between .50 and .55."""
    table = sensitivity_table(read_study(folder))
    assert table is not None
    simpo = table.frame["simpo"]
    means = np.array([dev_mean("simpo", place) for place in range(8)])
    assert simpo["Configs tried"] == "8"
    assert simpo["Best"] == "70.0%"
    assert simpo["Median"] == "52.5%"
    assert simpo["Worst"] == "0.0%"
    assert simpo["Standard deviation, points"] == f"{100 * means.std(ddof=1):.1f}"
    assert simpo["Collapsed or diverged"] == "1 of 8 (12%)"
    assert table.frame["dpo"]["Collapsed or diverged"] == "0 of 8 (0%)"
    (below,) = [name for name in table.frame.index if name.startswith("Below the SFT base (")]
    base = float(below.partition("(")[2].rstrip("%)")) / 100
    assert simpo[below].startswith(f"{sum(means < base)} of 8")
    assert simpo["Selected"] == LABELS["simpo"][5].replace(",", ", ")


def test_the_expected_best_is_that_of_all_draws_without_replacement() -> None:
    """Against the definition: the mean of the best over every subset of n."""
    scores = [0.1, 0.5, 0.5, 0.7, 0.0, 0.9]
    found = expected_best(scores)
    assert len(found) == 3
    for n, value in enumerate(found, start=1):
        assert value == pytest.approx(np.mean([max(part) for part in itertools.combinations(scores, n)]))
    assert expected_best([0.3]) == [0.3]


def test_figures_show_each_config_and_say_what_they_show(folder: Path) -> None:
    study = read_study(folder)
    drawings = {one.name: one for one in draw_search(study, looks(study.arms))}
    assert set(drawings) == {
        *("search-spread", "search-expected"),
        *("map-simpo-beta-gamma-beta-ratio", "map-simpo-lr-beta", "map-dpo-lr-beta"),
    }
    said = drawings["map-simpo-beta-gamma-beta-ratio"].alt_text
    assert "β 2, γ/β 0.3: 45.0%" in said, "the better of the two learning rates"
    assert "Each cell is the best over learning rate" in drawings["map-simpo-beta-gamma-beta-ratio"].caption
    assert (
        "SimPO: 8 configs from 0.0% to 70.0%, 1 collapsed or diverged; selected: " in drawings["search-spread"].alt_text
    )
    assert "tests nothing" in drawings["search-expected"].caption
    again = {one.name: one.svg for one in draw_search(study, looks(study.arms))}
    assert again == {name: one.svg for name, one in drawings.items()}


def test_the_report_has_the_search_in_both_forms(folder: Path) -> None:
    render_report(folder)
    html, text = (folder / "report.html").read_text(), (folder / "report.md").read_text()
    for page in (html, text):
        assert "Dev scores over the configs that were tried (2 tuning seeds)" in page
        assert "1 of 8 (12%)" in page
    assert 'id="figure-search-spread"' in html
    assert "figures/map-dpo-lr-beta.svg" in text


def test_a_study_that_was_not_tuned_has_no_search(tmp_path: Path) -> None:
    study = read_study(build_study(tmp_path / "study"))
    assert tried_configs(study) == {}
    assert sensitivity_table(study) is None
    assert draw_search(study, looks(study.arms)) == []


def test_a_half_done_search_is_shown_as_far_as_it_is(folder: Path) -> None:
    """Golden is not there yet, nothing is selected, and one arm has had fewer configs."""
    (folder / "selection.json").unlink()
    scores = pd.read_csv(folder / "scores.csv", keep_default_na=False)
    scores = scores[(scores["split"] == "dev") & ~scores["config"].isin(LABELS["dpo"][4:])]
    scores.to_csv(folder / "scores.csv", index=False)
    (folder / "verdict.json").unlink()
    table = sensitivity_table(read_study(folder))
    assert table is not None
    assert table.frame["dpo"]["Selected"] == "none yet"
    assert "unequal budgets" in table.notes[0]
    assert not is_fair(read_study(folder))
    render_report(folder)
