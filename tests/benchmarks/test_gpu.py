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
import gpu_parts

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
        assert set(part) == {"status", "seconds", "facts", "tables", "checks", "errors"}
        assert (part["status"], part["errors"]) == ("done", [])
        assert all(part["checks"].values())
    assert {"device", "cpus", "python", "torch", "trl", "matmul_tflops"} <= set(found["parts"]["machine"]["facts"])
    attention = found["parts"]["attention"]
    assert set(attention["tables"]["attention"]) == {"as it is", "without cuDNN", "varlen"}
    for row in attention["tables"]["attention"].values():
        assert set(row) == {"ms_fresh", "ms_seen", "memory_gb", "gap_to_fp32"}
        assert 0 < row["gap_to_fp32"] < 1e-5
    assert len(attention["checks"]) == 3
    assert len(found["parts"]["equality"]["checks"]) == 8
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


def test_parts_that_no_longer_fit_are_skipped(tmp_path: Path) -> None:
    status, found, page = run(tmp_path, "--budget", "0")
    assert status == 0
    assert {part["status"] for part in found["parts"].values()} == {"skipped: no time left"}
    assert set(found["parts"]) == set(gpu.PARTS)
    assert "| part study | **skipped: no time left** |" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tiny", "--parts", "nonsense"], "there is no part 'nonsense'; there are machine, attention"),
        (["--tiny", "--parts", ""], "there is no part ''"),
        (["--tiny", "--steps", "0"], "--steps"),
        (["--parts", "machine"], "torch sees no GPU"),
    ],
)
def test_what_cannot_be_run_is_a_usage_error(tmp_path: Path, capsys, arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as raised:
        gpu.main(["--out", str(tmp_path / "out"), *arguments])
    assert raised.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
