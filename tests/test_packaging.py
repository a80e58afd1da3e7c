"""What a user installs: the wheel carries conf/, sweeps/, templates and the embedded study; the notebook runs."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from harness.config.paths import CONF, SWEEPS
from harness.sweep.app import run_sweep
from tests.conftest import SMALL

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_an_installed_wheel_finds_its_config_from_any_folder(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)],
        check=True,
    )
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(tmp_path / "installed")
        shipped = {name for name in wheel.namelist() if name.endswith(".py")}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "harness").rglob("*.py")}
    assert shipped == modules | {"harness/conf/__init__.py", "harness/sweeps/__init__.py"}
    ran = subprocess.run(
        [sys.executable, "-m", "harness.sweep", "+method=simpo,dpo", "plan=true"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "installed"), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
    )
    assert "10 trials and the SFT base" in ran.stdout
    shown = subprocess.run(
        [sys.executable, "-c", "import harness.config.paths as c; print(c.CONF, c.SWEEPS)"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "installed")},
    )
    assert str(tmp_path / "installed" / "harness" / "conf") in shown.stdout


def test_a_checkout_uses_its_own_config() -> None:
    assert (CONF, SWEEPS) == (ROOT / "conf", ROOT / "sweeps")


def test_versions_in_the_constraints_are_pinned_and_name_no_place() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all("==" in line for line in lines)
    assert "torch==2.13.0" in lines
    assert not any("/" in line for line in lines)


@pytest.mark.slow
def test_the_notebooks_run_top_to_bottom_and_are_committed_without_output(tmp_path: Path, monkeypatch) -> None:
    grid = ["arms.simpo.beta=2,4", "arms.dpo.beta=0.1,0.2", "tuning_seeds=[9]", "seed=0,1", "study=tuned"]
    small = [*SMALL, f"results_dir={tmp_path / 'results'}"]
    run_sweep(["+method=simpo,dpo", *small, *grid])
    rates = ["arms.simpo.learning_rate=2e-3", "arms.dpo.learning_rate=2e-3"]  # enough for something to vary
    run_sweep(["+method=simpo,dpo", *small, *rates, "seed=0,1", "study=plain"])
    monkeypatch.chdir(tmp_path)
    tour, compare = (_executed(name) for name in ("tour", "compare"))
    assert tour["identity"]["status"] == "proved"
    assert tour["again"]["verdict"] == tour["decided"]["verdict"]
    assert tour["by_hand"] == pytest.approx(tour["decided"]["ci95"], abs=1e-9)
    assert {study.name for study in compare["studies"]} == {"plain", "tuned"}
    assert len(compare["grid"]) == 4
    assert compare["forest"]._repr_svg_().startswith("<svg")
    assert compare["drawings"]


def _executed(name: str) -> dict:
    """Run a notebook's cells in order, and return its names; it must define no function or class of its own."""
    notebook = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    names: dict = {}
    for cell in cells:
        source = "".join(cell["source"])
        assert "def " not in source
        assert "class " not in source
        exec(source, names)
    return names
