"""Search space of an arm -> its configs: the full grid, or random samples.

A space maps each key to a list of values or to an interval, such as `{low: 0.01, high: 1, log: true}`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any, TypeGuard

import numpy as np

from harness.config.schema import SearchConfig
from harness.study.errors import UsageError
from harness.study.files import digest

Space = Mapping[str, Any]
Params = dict[str, Any]
_TRIES = 200  # draws per requested config before a space counts as exhausted


def configs_of(arm: str, space: Space, search: SearchConfig) -> list[Params]:
    """Return the configs that are known before training; none where Optuna will suggest them.

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


def is_interval(values: Any) -> TypeGuard[Mapping[str, float]]:
    """Return True for `{low, high, log}`, False for a list of choices."""
    return isinstance(values, Mapping)


def grid(space: Space) -> list[Params]:
    """Return every combination, the last key varying fastest."""
    axes = [[(key, value) for value in dict.fromkeys(values)] for key, values in space.items()]
    return [dict(config) for config in itertools.product(*axes)]


def sample(arm: str, space: Space, count: int, *, seed: int) -> list[Params]:
    """Draw different configs at random (Bergstra and Bengio 2012): the same for the same arm, space and seed.

    Raises:
        UsageError: for a space with fewer than `count` configs.
    """
    rng = np.random.default_rng(int(digest([arm, seed])[:8], 16))
    found: dict[str, Params] = {}
    for _ in range(_TRIES * count):
        params = {key: _draw_value(rng, values) for key, values in space.items()}
        found.setdefault(digest(params), params)
        if len(found) == count:
            return list(found.values())
    raise UsageError(
        f"search.trials={count}: arms.{arm} has {len(found)} different configs only; list more values, or lower it"
    )


def _draw_value(rng: np.random.Generator, values: Any) -> Any:
    if not is_interval(values):
        return values[int(rng.integers(len(values)))]
    low, high = values["low"], values["high"]
    if values.get("log"):
        return rounded(math.exp(rng.uniform(math.log(low), math.log(high))))
    return rounded(rng.uniform(low, high))


def rounded(value: float) -> float:
    """Round to four digits, so that a config's label shows its values in full."""
    return float(f"{value:.4g}")


def interval_problem(values: Mapping[str, Any]) -> str | None:
    """Say what is wrong with the form of an interval; its ends are checked like any value."""
    form = "an interval is {low: A, high: B} with A < B, and log: true to search its logarithm"
    low, high, log = values.get("low"), values.get("high"), values.get("log", False)
    if not set(values) <= {"low", "high", "log"} or not isinstance(log, bool):
        return form
    if not isinstance(low, int | float) or not isinstance(high, int | float) or bool in (type(low), type(high)):
        return form
    if not low < high:
        return form
    return "log: true needs low > 0" if log and low <= 0 else None


def overrides_of(params: Params) -> list[str]:
    """Return a config as Hydra overrides."""
    return [f"method.{key}={value}" for key, value in params.items()]
