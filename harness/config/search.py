"""Where configs come from: a space's grid, random samples of it, or Optuna's suggestions; equally many for each arm.

A space is `{key: choices or interval}`: a list of values, or `{low: 0.01, high: 1, log: true}`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from harness.config.schema import SearchConfig
from harness.study.errors import UsageError
from harness.study.files import digest

Space = Mapping[str, Any]
Params = dict[str, Any]
_TRIES = 200  # samples drawn for each one wanted before a space counts as exhausted


def configs_of(arm: str, space: Space, search: SearchConfig) -> list[Params]:
    """Return the configs that are known before anything is trained; none where Optuna will suggest them.

    Raises:
        UsageError: for a space that the sampler cannot search.
    """
    intervals = [key for key, values in space.items() if is_interval(values)]
    if search.sampler == "grid":
        if intervals:
            raise UsageError(
                f"arms.{arm}.{intervals[0]}: an interval has no grid; list its values, or set search.sampler=random"
            )
        return grid(space)
    if search.trials is None:
        raise UsageError(f"search.trials=null: search.sampler={search.sampler} needs the number of configs an arm")
    return sample(arm, space, search.trials, seed=search.seed) if search.sampler == "random" else []


def is_interval(values: Any) -> bool:
    """Return True for `{low, high, log}`, False for a list of choices."""
    return isinstance(values, Mapping)


def grid(space: Space) -> list[Params]:
    """Return every combination, the last key varying fastest."""
    axes = [[(key, value) for value in dict.fromkeys(values)] for key, values in space.items()]
    return [dict(config) for config in itertools.product(*axes)]


def sample(arm: str, space: Space, count: int, *, seed: int) -> list[Params]:
    """Draw different configs at random (Bergstra and Bengio 2012): the same for the same arm, space and seed.

    Raises:
        UsageError: where the space has fewer than `count`.
    """
    rng = np.random.default_rng(int(digest([arm, seed])[:8], 16))
    found: dict[str, Params] = {}
    for _ in range(_TRIES * count):
        params = {key: _draw(rng, values) for key, values in space.items()}
        found.setdefault(digest(params), params)
        if len(found) == count:
            return list(found.values())
    raise UsageError(
        f"search.trials={count}: arms.{arm} has {len(found)} different configs only; list more values, or lower it"
    )


def _draw(rng: np.random.Generator, values: Any) -> Any:
    if not is_interval(values):
        return values[int(rng.integers(len(values)))]
    low, high = values["low"], values["high"]
    if values.get("log"):
        return rounded(math.exp(rng.uniform(math.log(low), math.log(high))))
    return rounded(rng.uniform(low, high))


def rounded(value: float) -> float:
    """Keep four digits, so that a config's label says its values in full."""
    return float(f"{value:.4g}")


def interval_problem(values: Mapping[str, Any]) -> str | None:
    """Say what is wrong with the form of an interval; its ends are checked like any value."""
    low, high = values.get("low"), values.get("high")
    is_form = set(values) <= {"low", "high", "log"} and isinstance(values.get("log", False), bool)
    numbers = all(isinstance(end, int | float) and not isinstance(end, bool) for end in (low, high))
    if not is_form or not numbers or not low < high:  # type: ignore[operator]
        return "an interval is {low: A, high: B} with A < B, and log: true to search its logarithm"
    if values.get("log") and low <= 0:  # type: ignore[operator]
        return "log: true needs low > 0"
    return None


def overrides_of(params: Params) -> list[str]:
    """Return a config as Hydra overrides."""
    return [f"method.{key}={value}" for key, value in params.items()]
