"""What is said of SimPO against DPO, held against a study: each claim has a status, a figure, and a reason if untested."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import yaml

from harness.report.claims import Claim, claims
from harness.report.page import render_report
from harness.report.study import read_study
from harness.study.files import read_json, read_jsonl, write_json, write_jsonl
from tests.study_fixture import HARDWARE, build_study


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return build_study(tmp_path / "study", prompts=30)


def claim(folder: Path, words: str) -> Claim:
    (found,) = [one for one in claims(read_study(folder)) if one.claim.startswith(words)]
    return found


def decide(folder: Path, **parts) -> None:
    write_json(folder / "verdict.json", read_json(folder / "verdict.json") | parts)


@pytest.mark.parametrize(
    ("verdict", "status"),
    [
        ("simpo", "holds"),
        ("dpo", "does not hold"),
        ("tie", "does not hold"),
        ("trade-off", "does not hold"),
        ("inconclusive", "undecided"),
    ],
)
def test_the_golden_win_is_the_verdict(verdict: str, status: str, folder: Path) -> None:
    decide(folder, verdict=verdict, difference=0.034, ci95=[0.01, 0.058])
    found = claim(folder, "wins on golden")
    assert found.status == status
    assert "+3.4 points, 95% +1.0 to +5.8" in found.figure


def cost(
    folder: Path, name: str, arm: str, memory: float, seconds: float, reference_seconds: float = 0.0, **more
) -> None:
    path = folder / "costs" / name
    path.mkdir(parents=True, exist_ok=True)
    manifest = {
        "arm": arm,
        "engine": "paired",
        "reference": name.partition("-")[2] or "cached",
        "hardware": HARDWARE,
        "tokens": {"train": 1000},
        "seconds": {"train": seconds, "reference": reference_seconds},
        "peak_memory_bytes": {"train": memory},
    }
    write_json(path / "manifest.json", manifest | more)


def test_costs_have_three_answers_measured_side_by_side(folder: Path) -> None:
    """SimPO 10 GB and 100 s; DPO 16 GB and 160 s with a second model, 10.1 GB and 150 s by switching, 10 GB cached."""
    cost(folder, "simpo", "simpo", 10e9, 100)
    cost(folder, "dpo-separate", "dpo", 16e9, 160)
    cost(folder, "dpo-adapter_off", "dpo", 10.1e9, 150)
    cost(folder, "dpo-cached", "dpo", 10e9, 90, reference_seconds=20)
    memory = {way: claim(folder, f"needs less memory than DPO with {way}") for way in ("a sep", "the ref", "cached")}
    assert [one.status for one in memory.values()] == ["holds", "does not hold", "does not hold"]
    assert memory["a sep"].figure == "10.00 against 16.00 GB: 0.62 times"
    assert "no difference that matters" in memory["the ref"].figure
    speed = {way: claim(folder, f"trains faster than DPO with {way}") for way in ("a sep", "the ref", "cached")}
    assert [one.status for one in speed.values()] == ["holds", "holds", "does not hold"]
    assert speed["cached"].figure == "100.00 against 90.00 s: 1.11 times; DPO's reference pass took 20.0 s once"


def test_costs_of_the_studys_own_trials_answer_for_the_way_that_they_took(folder: Path) -> None:
    """The fixture's DPO trains 7.1 s and SimPO 6.2 s, from the cache."""
    found = claim(folder, "trains faster than DPO with cached")
    assert found.status == "holds"
    assert found.figure.startswith("6.20 (6.20 to 6.20) against 7.10 (7.10 to 7.10) s: 0.87 times")
    other = claim(folder, "trains faster than DPO with a separate")
    assert (other.status, other.figure) == ("not tested", "no such trial; measure_costs=true trains one")


@pytest.mark.parametrize("fact", [{"engine": "stock"}, {"hardware": {"cpu": "another"}}, {"tokens": {"train": 999}}])
def test_unlike_trials_are_not_compared(fact: dict, folder: Path) -> None:
    cost(folder, "simpo", "simpo", 10e9, 100)
    cost(folder, "dpo-separate", "dpo", 16e9, 160, **fact)
    found = claim(folder, "needs less memory than DPO with a separate")
    assert found.status == "not tested"
    assert next(iter(fact)) in found.figure


def test_shorter_answers_need_a_verdict_that_is_no_worse(folder: Path) -> None:
    """In the fixture SimPO writes far less filler than DPO."""
    for verdict, status in (
        ("simpo", "holds"),
        ("tie", "holds"),
        ("inconclusive", "undecided"),
        ("dpo", "does not hold"),
    ):
        decide(folder, verdict=verdict)
        assert claim(folder, "answers shorter").status == status
    assert "tokens an answer, 95% " in claim(folder, "answers shorter").figure


def test_lengths_that_differ_by_a_hair_do_not_matter(folder: Path) -> None:
    """Every answer of SimPO is one token in a hundred shorter: sure, and nothing to ship a model for."""
    for path in folder.glob("trials/*/completions.jsonl"):
        arm = read_json(path.parent / "manifest.json")["arm"]
        rows = [row | {"tokens": 99 if arm == "simpo" else 100} for row in read_jsonl(path)]
        write_jsonl(path, rows)
    found = claim(folder, "answers shorter")
    assert found.status == "does not hold"
    assert found.figure.startswith("−1.00 tokens an answer")
    assert "no difference that matters" in found.figure


def test_sensitivity_and_noise_and_taxes_say_why_they_were_not_tested(folder: Path) -> None:
    for words, reason in (
        ("is more sensitive", "fewer than 4 configs"),
        ("is less robust", "+sweep=noise"),
        ("loses more of other abilities", "decide.guards"),
    ):
        found = claim(folder, words)
        assert found.status == "not tested"
        assert reason in found.figure


def with_grid(folder: Path, spreads: dict[str, float], configs: int = 12) -> None:
    scores = pd.read_csv(folder / "scores.csv", keep_default_na=False)
    rows = [
        {"arm": arm, "config": f"beta={n},lr=1", "seed": 100, "split": "dev", "prompt_id": "p", "scorer": "checks"}
        | {"stage": "select", "score": 0.5 + spread * (n / (configs - 1) - 0.5)}
        for arm, spread in spreads.items()
        for n in range(configs)
    ]
    pd.concat([scores[scores["split"] == "golden"], pd.DataFrame(rows)]).to_csv(folder / "scores.csv", index=False)


@pytest.mark.parametrize(
    ("simpo", "dpo", "status"), [(0.8, 0.1, "holds"), (0.1, 0.8, "does not hold"), (0.4, 0.4, "undecided")]
)
def test_sensitivity_compares_deviations_from_the_median(simpo: float, dpo: float, status: str, folder: Path) -> None:
    """Twelve configs evenly over a range of r: the mean deviation is r * 3/11, so the difference is known."""
    with_grid(folder, {"simpo": simpo, "dpo": dpo})
    found = claim(folder, "is more sensitive")
    assert found.status == status
    shown = f"{100 * (simpo - dpo) * 3 / 11:+.1f}".replace("-", "−") if simpo != dpo else "0.0"
    assert f"mean deviation {shown} points" in found.figure


def test_a_guard_measures_the_tax(folder: Path) -> None:
    """`checks_fraction` taken as a guard: SimPO's answers are better in the fixture, so it loses nothing."""
    settings = yaml.safe_load((folder / "study.yaml").read_text())
    settings.pop("sha256", None)
    settings["guards"] = [{"metric": "checks_fraction", "margin": 0.02}, {"metric": "gsm8k", "margin": 0.02}]
    (folder / "study.yaml").write_text(yaml.safe_dump(settings))
    found = claim(folder, "loses more of other abilities: checks_fraction")
    assert found.status in ("does not hold", "undecided")
    assert "minus the SFT base" in found.figure
    missing = claim(folder, "loses more of other abilities: gsm8k")
    assert missing.status == "not tested"


def test_another_contrast_has_no_such_claims(folder: Path) -> None:
    decide(folder, arms=["dpo_norm", "dpo"])
    assert claims(read_study(folder)) == []


def test_the_report_has_the_table_and_a_half_done_study_breaks_nothing(folder: Path) -> None:
    render_report(folder)
    for page in ("report.html", "report.md"):
        text = (folder / page).read_text()
        assert "What is said of SimPO against DPO" in text
        assert "trains faster than DPO with cached reference" in text
    (folder / "verdict.json").unlink()
    (folder / "scores.csv").unlink()
    render_report(folder)
    assert claim(folder, "wins on golden").status == "not tested"
