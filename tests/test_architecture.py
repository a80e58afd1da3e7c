"""The shape of the code: one library, one home; imports go downwards; deciding needs neither torch nor Hydra."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import harness
from harness.config.arms import ARMS

PACKAGE = Path(harness.__file__).parent
ROOT = Path(__file__).resolve().parents[1]
FILES = {str(path.relative_to(PACKAGE)): path for path in sorted(PACKAGE.rglob("*.py"))}

HOMES = {
    "trl": {"train", "embedded", "bench"},
    "matplotlib": {"report"},
    "wandb": {"track"},
    "wandb_workspaces": {"track"},
    "ray": {"sweep"},
    "submitit": {"sweep"},
    "optuna": {"sweep"},
    "openai": {"score"},
    "lm_eval": {"score"},
}
MAX_FILES = 19  # of a package, beside __init__.py and __main__.py
MAX_PACKAGES = 12


def imports(path: Path) -> set[str]:
    """Return the modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module)
    return found


@pytest.mark.parametrize("library", HOMES)
def test_a_library_is_imported_in_one_package(library: str) -> None:
    users = {Path(name).parts[0] for name, path in FILES.items() if library in {m.split(".")[0] for m in imports(path)}}
    assert users == HOMES[library]


def linted(root: Path) -> subprocess.CompletedProcess[str]:
    """Run import-linter over a checkout."""
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache", root / "pyproject.toml"]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, env={"PYTHONPATH": str(root)})


@pytest.mark.parametrize(
    ("module", "planted", "broken"),
    [
        ("data/plan.py", "from harness.train import losses", "stages in the order of the data"),
        ("score/answers.py", "from harness.decide import stats", "stages in the order of the data"),
        ("decide/stats.py", "import torch", "deciding and reporting need neither torch nor Hydra"),
        ("data/records.py", "from harness.data import splits", "no circles"),
        ("config/keys.py", "def later():\n    from harness.data import plan", "stages in the order of the data"),
    ],
)
def test_a_planted_import_against_the_order_breaks_a_contract(
    tmp_path: Path, module: str, planted: str, broken: str
) -> None:
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    for name, path in FILES.items():
        copy = tmp_path / "harness" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text() + (f"\n{planted}\n" if name == module else ""))
    ran = linted(tmp_path)
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert f"{broken} BROKEN" in ran.stdout


def test_the_contracts_hold_as_the_code_stands() -> None:
    ran = linted(ROOT)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_deciding_loads_few_modules_and_neither_hydra_nor_torch() -> None:
    code = "import harness.decide, sys; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "trl", "hydra", "omegaconf"} & set(modules)
    assert sum(name.split(".")[0] == "harness" for name in modules) <= 28


def test_packages_stay_small_and_few() -> None:
    packages = {path.parent for path in FILES.values() if path.parent != PACKAGE}
    assert len(packages) <= MAX_PACKAGES
    for package in packages:
        files = {path.name for path in package.glob("*.py")} - {"__init__.py", "__main__.py"}
        assert len(files) <= MAX_FILES, f"{package.name} has {len(files)} files"


def test_nobody_but_the_table_of_arms_compares_an_arms_name() -> None:
    for name, path in FILES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                values = {c.value for c in ast.walk(node) if isinstance(c, ast.Constant) and isinstance(c.value, str)}
                assert not values & set(ARMS), f"{name}:{node.lineno} compares an arm's name"


# A process that serves a launcher's jobs has one context; a name's words are the same for every study, and so are the
# kernels of a card and what they compute.
CACHES = {
    "sweep/launch.py: worker_context",
    "data/ratings.py: _words",
    "train/attention.py: kernel_problem",
    "train/attention.py: varlen_attn",
}


def test_no_module_keeps_state_between_studies() -> None:
    """No cache on a module's function, no empty container or variable that functions fill later."""
    found = set()
    for name, path in FILES.items():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and any("cache" in ast.unparse(d) for d in node.decorator_list):
                found.add(f"{name}: {node.name}")
            is_variable = isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None
            if is_variable and ast.unparse(node.value) in ("{}", "[]", "set()", "dict()", "list()", "None"):
                found.add(f"{name}: {ast.unparse(node).partition(' ')[0].rstrip(':')}")
        found |= {f"{name}: global" for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Global)}
    assert found == CACHES


def test_few_types_are_left_open() -> None:
    """`Any`, `object`, `cast` and `type: ignore`, counted together, which hide what a value is."""
    count = 0
    for path in FILES.values():
        text = path.read_text()
        names = [node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)]
        count += sum(name in ("Any", "object", "cast") for name in names) + text.count("# type: ignore")
    assert count < 200


def test_there_is_no_drawer_for_odds_and_ends() -> None:
    assert not {"utils.py", "common.py", "helpers.py"} & {Path(name).name for name in FILES}
