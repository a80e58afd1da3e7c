"""Which environment variable may hold a judge's key. The one place that reads a key out of the environment."""

from __future__ import annotations

import os
import re

from harness.records import UsageError
from harness.untrusted import one_line

# Its name says neither KEY nor TOKEN: `harness.redaction` would hide what it lists, in the very message about it.
LISTED = "HARNESS_JUDGE_VARIABLES"
_JUDGES = re.compile(r"OPENAI_API_KEY|\w+_JUDGE_KEY")


def key_problem(variable: str) -> str | None:
    """Say why an environment variable may not be sent to a judge as its key, or None where it may."""
    listed = [name.strip() for name in os.environ.get(LISTED, "").split(",")]
    if _JUDGES.fullmatch(variable) or variable in listed:
        return None
    name = one_line(variable, 80)
    return (
        f"score.judge.api_key_env={name}: not a judge's key, and what it holds would be sent to the judge; allowed: "
        f"OPENAI_API_KEY, a name that ends in _JUDGE_KEY, or one that the environment variable {LISTED} lists "
        f"(NAME,NAME): put it there only if it is a judge's"
    )


def judge_key(variable: str) -> str | None:
    """Return the key that a variable holds, or None where it holds none.

    Raises:
        UsageError: for a variable that may not be sent to a judge.
    """
    problem = key_problem(variable)
    if problem:
        raise UsageError(problem)
    return os.environ.get(variable) or None
