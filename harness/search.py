"""Where configs come from: a space's grid, random samples of it, or Optuna's suggestions; equally many for each arm.

A space is `{key: choices or interval}`: a list of values, or `{low: 0.01, high: 1, log: true}`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from harness.records import UsageError, digest
from harness.schema import SearchConfig

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


class Optuna:
    """Ask Optuna's TPE for an arm's next configs and tell it their dev scores; the same answers give the same asks.

    Optuna is called directly: Hydra's Optuna plugin holds back to a release without its fixes. Each arm has a study of
    its own with the same number of trials, and all are told the same method-neutral metric.
    """

    def __init__(self, arm: str, space: Space, search: SearchConfig) -> None:
        try:
            import optuna
        except ImportError as error:
            raise UsageError(
                "search.sampler=tpe: Optuna is not installed; pip install 'dpo-simpo-harness[optuna]'"
            ) from error
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.space = {key: _distribution(optuna, values) for key, values in space.items()}
        startup = max(search.batch, min(10, (search.trials or 1) // 2))  # random ones before the model of the space
        sampler = optuna.samplers.TPESampler(seed=search.seed, n_startup_trials=startup, constant_liar=True)
        self.study = optuna.create_study(direction="maximize", sampler=sampler)
        self.asked: list[Any] = []

    def ask(self, count: int) -> list[Params]:
        """Return the next configs to train; they may repeat an earlier one."""
        self.asked = [self.study.ask(self.space) for _ in range(count)]
        return [{key: _plain(value) for key, value in trial.params.items()} for trial in self.asked]

    def tell(self, scores: Sequence[float]) -> None:
        """Enter the mean dev scores of the configs that were asked last."""
        for trial, score in zip(self.asked, scores, strict=True):
            self.study.tell(trial, score)


def _distribution(optuna: Any, values: Any) -> Any:
    if is_interval(values):
        return optuna.distributions.FloatDistribution(values["low"], values["high"], log=values.get("log", False))
    return optuna.distributions.CategoricalDistribution(list(values))


def _plain(value: Any) -> Any:
    return rounded(value) if isinstance(value, float) else value
