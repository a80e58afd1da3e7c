"""The shape of the code: one library, one home; arrows point one way; what decides needs no torch."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import harness

PACKAGE = Path(harness.__file__).parent
FILES = {str(path.relative_to(PACKAGE)): path for path in sorted(PACKAGE.rglob("*.py"))}

HOMES = {
    "trl": {"trainers.py", "engine.py", "head.py", "embedded/build.py", "bench/stock.py"},
    "hydra": {"composer.py", "config.py", "overrides.py", "plugins.py", "raylauncher.py", "sweep.py", "sweeper.py"},
    "ray": {"raylauncher.py"},
    "submitit": {"slurmqueue.py"},
    "optuna": {"search.py"},
    "wandb": {"tracking.py", "publish.py"},
    "wandb_workspaces": {"publish.py"},
    "matplotlib": {"figures.py", "forest.py", "gridplots.py", "promptplots.py"},
}
TORCH_FREE = [
    "records.py",
    "stats.py",
    "scores_file.py",
    "identity.py",
    "decide.py",
    "study.py",
    "report.py",
    "figures.py",
    "dashboard.py",
]


def imports(path: Path, *, at_import: bool = False) -> set[str]:
    """Return the modules that a file imports, anywhere in it or only while it is itself imported."""
    found = set()
    tree = ast.parse(path.read_text())
    nodes = tree.body if at_import else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module)
    return found


@pytest.mark.parametrize("library", HOMES)
def test_a_library_has_one_home(library: str) -> None:
    users = {name for name, path in FILES.items() if any(m.split(".")[0] == library for m in imports(path))}
    assert users == HOMES[library]


@pytest.mark.parametrize("name", TORCH_FREE)
def test_what_decides_and_reports_never_mentions_torch(name: str) -> None:
    reached, todo = set(), {name}
    while todo:
        current = todo.pop()
        reached.add(current)
        for module in imports(FILES[current], at_import=True):
            assert module.split(".")[0] not in ("torch", "transformers", "trl", "peft"), f"{current} imports {module}"
            local = module.removeprefix("harness.").replace(".", "/") + ".py"
            if module.startswith("harness.") and local in FILES and local not in reached:
                todo.add(local)


def test_nobody_but_the_table_of_arms_compares_an_arms_name() -> None:
    for name, path in FILES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                values = {c.value for c in ast.walk(node) if isinstance(c, ast.Constant) and isinstance(c.value, str)}
                assert not values & {"dpo", "simpo", "dpo_norm"}, f"{name}:{node.lineno} compares an arm's name"


def test_there_is_no_drawer_for_odds_and_ends() -> None:
    assert not {"utils.py", "common.py", "helpers.py", "base.py"} & {Path(name).name for name in FILES}


def test_files_and_functions_stay_small() -> None:
    for name, path in FILES.items():
        text = path.read_text()
        assert text.count("\n") <= 300, f"{name} has {text.count(chr(10))} lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                size = (node.end_lineno or 0) - node.lineno + 1
                assert size <= 50, f"{name}: {node.name} has {size} lines"
