"""The check for a GPU, in its small form on a CPU: what it writes is right, and what fails in it is neither fatal nor silent."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import gpu
import gpu_computed
import gpu_parts

from harness.config.paths import embedded_dir

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: run benchmarks/gpu.py itself")
ENGINES = [f"{arm}, {precision}" for arm in ("dpo", "simpo") for precision in ("fp32", "bf16")]


def run(folder: Path, *arguments: str) -> tuple[int, dict[str, Any], str]:
    """Run the script; return its exit status and the two files that it wrote."""
    status = gpu.main(["--tiny", "--out", str(folder), *arguments])
    return status, json.loads((folder / "gpu.json").read_text()), (folder / "gpu.md").read_text()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, Any], str]:
    return run(tmp_path_factory.mktemp("gpu"), "--parts", "machine,attention,equality")


@pytest.mark.slow
@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("attention", ["as it is", "varlen"])
def test_both_engines_train_alike(written, name: str, attention: str) -> None:
    tables = written[1]["parts"]["equality"]["tables"]
    stock, ours = tables["TRL's own trainer"][name], tables["the paired engine"][f"{name}, attention {attention}"]
    assert ours["packed"] is True
    assert len(ours["loss"]) == len(stock["loss"]) == stock["steps"] >= 2
    for key in ("loss", "grad_norm"):
        assert ours[key] == pytest.approx(stock[key], rel=1e-4 if "fp32" in name else 5e-2)
        gaps = [abs(a - b) / b for a, b in zip(ours[key], stock[key], strict=True)]
        assert ours[f"{key}_gap"] == pytest.approx(max(gaps), abs=1e-6)


@pytest.mark.slow
def test_the_json_has_every_key_and_the_page_says_that_it_measured_no_gpu(written) -> None:
    status, found, page = written
    assert status == 0
    assert {"measured_on_a_gpu", "device", "tiny", "seconds", "parts"} == set(found)
    assert found["measured_on_a_gpu"] is False
    assert list(found["parts"]) == ["machine", "attention", "equality"]
    for part in found["parts"].values():
        assert set(part) == {"status", "seconds", "facts", "tables", "checks", "targets", "errors"}
        assert (part["status"], part["errors"]) == ("done", [])
        assert all(part["checks"].values())
    assert {"device", "cpus", "python", "torch", "trl", "matmul_tflops"} <= set(found["parts"]["machine"]["facts"])
    attention = found["parts"]["attention"]
    assert set(attention["tables"]["attention"]) == {"as it is", "without cuDNN", "varlen"}
    for row in attention["tables"]["attention"].values():
        assert set(row) == {"ms_fresh", "ms_seen", "memory_gb", "gap_to_fp32"}
        assert 0 < row["gap_to_fp32"] < 1e-5
    assert len(attention["checks"]) == 3
    checks = found["parts"]["equality"]["checks"]
    assert len(checks) == 12
    assert checks["dpo, bf16, attention varlen: starts at log 2, within 0.001"]
    assert "no figure on this page was measured on a GPU" in page.splitlines()[0]
    assert "does not hold" not in page
    assert "0.693" in page  # DPO's first loss


def test_a_part_that_raises_is_recorded_and_the_rest_goes_on(tmp_path: Path, monkeypatch) -> None:
    def broken(settings, found) -> None:
        found.row("half", "a", {"seconds": float("nan")})
        raise ValueError("no such\nkernel")

    monkeypatch.setitem(gpu.PARTS, "attention", gpu.Part(broken, 0))
    status, found, page = run(tmp_path, "--parts", "attention,machine")
    assert status == 1
    assert found["parts"]["attention"]["status"] == "failed"
    assert found["parts"]["attention"]["errors"] == ["ValueError: no such\nkernel"]
    assert found["parts"]["attention"]["tables"] == {"half": {"a": {"seconds": "nan"}}}  # JSON has no NaN
    assert found["parts"]["machine"]["status"] == "done"
    assert "| part attention | **failed** |" in page
    assert "**ValueError: no such kernel**" in page


def test_one_attention_that_raises_leaves_the_others_and_a_check_that_does_not_hold_is_no_success(
    tmp_path: Path, monkeypatch
) -> None:
    def broken(*args, **kwargs):
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(gpu_parts, "varlen_attention", broken)
    status, found, page = run(tmp_path, "--parts", "attention")
    rows = found["parts"]["attention"]["tables"]["attention"]
    assert (status, rows["varlen"]) == (1, {"error": "OutOfMemoryError: none left"})
    assert rows["as it is"]["ms_fresh"] > 0
    assert "| varlen | – | – | – | OutOfMemoryError: none left |" in page
    monkeypatch.undo()
    monkeypatch.setitem(gpu_parts.ATTENTION_GAP, "cpu", 0.0)
    status, found, page = run(tmp_path, "--parts", "attention")
    assert (status, found["parts"]["attention"]["status"]) == (1, "done")
    assert page.count("**does not hold**") == 3


def test_a_gap_that_is_not_a_number_does_not_pass() -> None:
    """`max()` of numbers loses a NaN that is not its first."""
    ones, lost = torch.ones(3), torch.tensor([1.0, float("nan"), 1.0])
    assert not gpu_parts._gap([ones, lost], [ones, ones]) <= 1.0


@pytest.fixture(scope="module")
def speed(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, Any], str]:
    status, found, page = run(tmp_path_factory.mktemp("gpu"), "--parts", "machine,speed")
    return status, found["parts"]["speed"], page


@pytest.mark.slow
def test_both_sides_train_on_the_same_pairs_for_the_same_loss(speed) -> None:
    status, found, _ = speed
    assert (status, found["errors"]) == (0, [])
    runs = found["tables"]["training"]
    for ours, theirs in (("paired DPO", "TRL's DPO, online reference"), ("paired SimPO", "TRL's SimPO")):
        assert runs[ours]["first_loss"] == pytest.approx(runs[theirs]["first_loss"], rel=0.05)
        assert runs[ours]["pairs"] == runs[theirs]["pairs"] == 4
        assert runs[ours]["packed"] is True
    assert runs["TRL's DPO, online reference"]["checkpointing"] is True, "TRL's default"
    assert runs["TRL's DPO, precomputed reference"]["reference_ms_a_pair"] > 0
    assert runs["paired DPO"]["first_loss"] == pytest.approx(0.6931, abs=1e-3), "its reference is the harness's own"
    (noise,) = found["tables"]["reference in bf16"].values()
    assert noise["refused"] == "no"
    assert runs["TRL's DPO, online reference, Liger"]["skipped"].startswith("liger_kernel is not installed")


@pytest.mark.slow
def test_a_ratio_has_the_reference_pass_of_both_sides_in_it(speed) -> None:
    runs, ratios = (speed[1]["tables"][name] for name in ("training", "the paired engine against TRL's trainer"))
    a, b = runs["paired DPO"], runs["TRL's DPO, precomputed reference"]
    pass_ms = speed[1]["tables"]["reference pass"]["attention varlen"]["ms_a_pair"]
    assert a["reference_ms_a_pair"] == pass_ms
    stock = b["ms_a_pair"] + b["reference_ms_a_pair"]
    ratio = ratios["paired DPO / TRL's DPO, precomputed reference"]
    assert ratio["time"] == pytest.approx((a["ms_a_pair"] + pass_ms) / stock)
    assert ratio["time_in_a_grid_of_8_computed"] == pytest.approx((a["ms_a_pair"] + pass_ms / 8) / stock)


@pytest.mark.slow
def test_targets_stand_beside_what_was_measured_and_a_missed_one_is_no_failure(speed) -> None:
    status, found, page = speed
    names = [
        "paired DPO / TRL's DPO, online reference: seconds a pair",
        "paired DPO / TRL's DPO, precomputed reference: seconds a pair",
        "paired SimPO / TRL's SimPO: seconds a pair",
        "paired DPO: share of the measured rate",
        "paired SimPO: share of the measured rate",
    ]
    assert list(found["targets"]) == names, "memory is a GPU's"
    share = found["targets"][names[3]]
    assert (share["target"], share["reached"], status) == ("at least 0.45", False, 0)
    assert f"| {names[3]} | {share['measured']:.3g} | at least 0.45 | **missed** |" in page


@pytest.mark.slow
def test_the_profile_names_what_took_a_steps_time(speed) -> None:
    rows = list(speed[1]["tables"]["operators of a paired step, longest first"].values())
    assert "aten::mm" in {row["kernel"] for row in rows}
    assert [row["ms"] for row in rows] == sorted((row["ms"] for row in rows), reverse=True)
    assert 0.5 < sum(row["share"] for row in rows) <= 1.0


@pytest.mark.slow
def test_a_study_of_a_real_model_goes_to_its_verdict_and_on_where_it_was(tmp_path: Path) -> None:
    """The embedded model stands for a real one; the same command again trains nothing."""
    folders = ["--smollm2", str(embedded_dir()), "--pairs", str(embedded_dir())]
    status, found, _ = run(tmp_path, *folders)
    assert (status, list(found["parts"])) == (0, ["machine", "smollm2"])
    facts = found["parts"]["smollm2"]["facts"]
    assert (facts["trials"], facts["verdict"]) == (4, "inconclusive")
    trials = sorted((tmp_path / "smollm2" / "gpu" / "trials").iterdir())
    before = [(path / "manifest.json").stat().st_mtime for path in trials]
    assert run(tmp_path, *folders)[1]["parts"]["smollm2"]["facts"]["verdict"] == "inconclusive"
    assert [(path / "manifest.json").stat().st_mtime for path in trials] == before


@pytest.mark.slow
def test_the_page_has_the_computed_table_and_says_first_that_nothing_was_measured() -> None:
    page = (Path(gpu.__file__).parent / "gpu.md").read_text()
    assert "no figure on this page was measured on a GPU" in page.splitlines()[0]
    assert gpu_computed.table() in page


def test_a_target_that_was_not_measured_is_not_noted() -> None:
    found = gpu_parts.Found()
    found.aim("a", None, most=1.0)
    found.aim("b", 0.5, most=0.5)
    found.aim("c", 0.44, least=0.45)
    found.aim("d", float("nan"), most=1.0)
    assert {name: row["reached"] for name, row in found.targets.items()} == {"b": True, "c": False, "d": False}


def test_parts_that_no_longer_fit_are_skipped(tmp_path: Path) -> None:
    status, found, page = run(tmp_path, "--budget", "0")
    assert status == 0
    assert {part["status"] for part in found["parts"].values()} == {"skipped: no time left"}
    assert list(found["parts"]) == ["machine", "attention", "equality", "speed", "memory", "study"]
    assert "| part study | **skipped: no time left** |" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tiny", "--parts", "nonsense"], "there is no part 'nonsense'; there are machine, attention"),
        (["--tiny", "--parts", ""], "there is no part ''"),
        (["--tiny", "--steps", "0"], "--steps"),
        (["--parts", "machine"], "torch sees no GPU"),
        (["--tiny", "--parts", "smollm2"], "part smollm2: give both --smollm2 FOLDER and --pairs FOLDER"),
        (["--tiny", "--pairs", "somewhere"], "part smollm2: give both"),
        (["--tiny", "--smollm2", "nowhere", "--pairs", "nowhere"], "there is no nowhere/config.json"),
    ],
)
def test_what_cannot_be_run_is_a_usage_error(tmp_path: Path, capsys, arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as raised:
        gpu.main(["--out", str(tmp_path / "out"), *arguments])
    assert raised.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
