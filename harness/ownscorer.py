"""A scorer of your own: a Python file with `score(outputs) -> list[Score]`, named by its file.

Code that the user points at runs as the user; nothing is loaded that the command line does not name.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

from harness.records import UsageError
from harness.scorers import SCORERS, Score, TrialOutputs

Scorer = Callable[[TrialOutputs], list[Score]]


def is_file(name: str) -> bool:
    """Return True where a scorer is given as a file."""
    return name.endswith(".py")


def scorer_name(name: str) -> str:
    """Return the name that a scorer has in the scores: that of its file, without `.py`."""
    return Path(name).stem if is_file(name) else name


def own_scorer_problem(path: str) -> str | None:
    """Say why a file cannot be a scorer, as far as it shows without running it."""
    if not Path(path).is_file():
        return f"{path}: no such file; give a Python file with a function `score`"
    if not scorer_name(path).isidentifier() or scorer_name(path) in SCORERS:
        return f"{path}: a scorer is named by its file; choose a name that is an identifier and not yet a scorer's"
    return None


def load_scorer(path: str) -> Scorer:
    """Load a file's function `score`.

    Raises:
        UsageError: for no such file, one that fails, or one without the function.
    """
    problem = own_scorer_problem(path)
    if problem:
        raise UsageError(problem)
    spec = importlib.util.spec_from_file_location(f"own_scorer_{scorer_name(path)}", path)
    assert spec is not None, "a .py file has a loader"
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UsageError(f"{path}: fails when it is loaded ({type(error).__name__}: {error})") from error
    score = getattr(module, "score", None)
    if not callable(score):
        raise UsageError(f"{path}: has no function `score(outputs)`; see docs/scorers.md")

    def checked(outputs: TrialOutputs) -> list[Score]:
        try:
            found = list(score(outputs))
        except Exception as error:
            raise UsageError(f"{path}: score() failed ({type(error).__name__}: {error})") from error
        wrong = next((one for one in found if not isinstance(one, Score)), None)
        if wrong is not None:
            raise UsageError(f"{path}: score() returned {wrong!r}; allowed: a list of harness.scorers.Score")
        return found

    return checked
