"""CONTRIBUTING.md names every file of the package and every package in its order, and the files that it points at exist.

`python -m tests.test_contributing` writes the map into CONTRIBUTING.md as the docstrings give it.
"""

from __future__ import annotations

import ast
import itertools
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "CONTRIBUTING.md"
TEXT = PAGE.read_text()
MAP = TEXT.split("```text\n")[1].split("```")[0]


def purpose(path: Path) -> str:
    """Return the first sentence of a module's docstring."""
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    return re.split(r"\.(?:\s|$)", docstring.replace("\n", " "), maxsplit=1)[0]


def layers() -> list[list[str]]:
    """Return the packages from bottom to top as import-linter holds them; those of one level do not import each other."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        contracts = tomllib.load(file)["tool"]["importlinter"]["contracts"]
    return [level.split(" | ") for level in reversed(contracts[0]["layers"])]


def modules() -> dict[str, Path]:
    """Return the modules by their place in the map: those of the top level first, packages from bottom to top."""
    package = ROOT / "harness"
    order = ["", *itertools.chain(*layers()), "embedded"]
    paths = [path for path in package.rglob("*.py") if path.name != "__init__.py" or path.parent.parent == package]
    paths.sort(key=lambda path: (order.index(_folder(path)), path.name != "__init__.py", path.name))
    return {str(path.relative_to(package)): path for path in paths}


def _folder(path: Path) -> str:
    return path.relative_to(ROOT / "harness").parent.name


def written_map() -> str:
    """Return the map: a line per package and per file, with its purpose."""
    lines = ["harness/"]
    for name, path in modules().items():
        folder, _, file = name.rpartition("/")
        if file == "__init__.py":
            lines.append(f"  {folder + '/':<24}{purpose(path)}")
        else:
            lines.append(f"{'    ' if folder else '  '}{file:<{22 if folder else 24}}{purpose(path)}")
    return "\n".join(lines) + "\n"


def test_the_map_is_that_of_the_files_and_their_docstrings() -> None:
    assert written_map() == MAP, "`python -m tests.test_contributing` writes the map again"


def test_every_file_of_the_map_has_a_purpose() -> None:
    assert [line for line in MAP.splitlines()[1:] if len(line.split()) < 3] == []


def test_the_packages_stand_in_the_order_that_the_import_contract_holds() -> None:
    (order,) = re.findall(r"^`(study -> .*)`$", TEXT, re.MULTILINE)
    assert [level.split(" | ") for level in order.split(" -> ")] == layers()


def test_every_file_that_is_pointed_at_exists() -> None:
    prose = TEXT.replace(MAP, "")
    paths = set(re.findall(r"`((?:harness|tests|conf|docs|sweeps|benchmarks)/[\w./]*)`", prose))
    assert len(paths) > 15
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


if __name__ == "__main__":
    PAGE.write_text(TEXT.replace(MAP, written_map()))
