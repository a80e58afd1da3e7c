"""Where configs come from: grids, random samples and Optuna, equally many for each arm and the same every time."""

from __future__ import annotations

import math

import numpy as np
import pytest

from harness.config.schema import SearchConfig
from harness.config.search import configs_of, grid, interval_problem, overrides_of, sample
from harness.study.errors import UsageError
from harness.sweep.tuning import Optuna

SPACE = {"beta": {"low": 0.01, "high": 1.0, "log": True}, "gamma_beta_ratio": [0.0, 0.5, 1.0]}


def test_a_grid_is_every_combination_once() -> None:
    assert grid({"beta": [1, 2, 2], "lr": [3, 4]}) == [
        {"beta": 1, "lr": 3},
        {"beta": 1, "lr": 4},
        {"beta": 2, "lr": 3},
        {"beta": 2, "lr": 4},
    ]
    assert grid({}) == [{}]


def test_random_configs_are_different_from_each_other_and_the_same_every_time() -> None:
    first, again = (sample("simpo", SPACE, 30, seed=1) for _ in range(2))
    assert first == again
    assert len({str(config) for config in first}) == 30
    assert first != sample("simpo", SPACE, 30, seed=2)
    assert first[:10] == sample("simpo", SPACE, 10, seed=1), "more trials keep those that were there"


def test_an_interval_is_drawn_between_its_ends_uniformly_in_the_logarithm() -> None:
    found = [config["beta"] for config in sample("simpo", SPACE, 800, seed=0)]
    assert min(found) >= 0.01
    assert max(found) <= 1.0
    quartiles = np.quantile(np.log10(found), [0.25, 0.5, 0.75])
    assert quartiles == pytest.approx([-1.5, -1.0, -0.5], abs=0.12)
    plain = [c["x"] for c in sample("simpo", {"x": {"low": 0.0, "high": 1.0}}, 800, seed=0)]
    assert np.quantile(plain, [0.25, 0.5, 0.75]) == pytest.approx([0.25, 0.5, 0.75], abs=0.06)


def test_a_space_that_is_too_small_is_refused() -> None:
    with pytest.raises(UsageError, match=r"search\.trials=4: arms\.dpo has 3 different configs only"):
        sample("dpo", {"beta": [1, 2, 3]}, 4, seed=0)


@pytest.mark.parametrize(
    ("interval", "problem"),
    [
        ({"low": 1, "high": 2}, None),
        ({"low": 1, "high": 2, "log": True}, None),
        ({"low": 2, "high": 1}, "A < B"),
        ({"low": 1}, "A < B"),
        ({"low": 0, "high": 1, "log": True}, "low > 0"),
        ({"low": 1, "high": 2, "step": 1}, "an interval is"),
        ({"low": "a", "high": 2}, "an interval is"),
        ({"low": True, "high": 2}, "an interval is"),
    ],
)
def test_the_form_of_an_interval(interval: dict, problem: str | None) -> None:
    found = interval_problem(interval)
    assert (found is None) if problem is None else problem in str(found)


def test_what_a_sampler_cannot_search_is_refused() -> None:
    with pytest.raises(UsageError, match=r"arms\.dpo\.beta: an interval has no grid"):
        configs_of("dpo", SPACE, SearchConfig())
    for sampler in ("random", "tpe"):
        with pytest.raises(UsageError, match=f"search.sampler={sampler} needs the number of configs"):
            configs_of("dpo", SPACE, SearchConfig(sampler=sampler))


def test_a_config_as_overrides() -> None:
    assert overrides_of({"beta": 0.5, "gamma_beta_ratio": 0.0}) == ["method.beta=0.5", "method.gamma_beta_ratio=0.0"]


def test_optuna_finds_a_better_place_than_chance_and_the_same_one_every_time() -> None:
    """The score falls with the distance of log beta from log 0.1 and of the ratio from 0.5."""

    def score(config: dict) -> float:
        return 1 - abs(math.log10(config["beta"]) + 1) / 2 - abs(config["gamma_beta_ratio"] - 0.5)

    def search(seed: int) -> list[dict]:
        sampler = Optuna("simpo", SPACE, SearchConfig(sampler="tpe", trials=32, seed=seed))
        found = []
        for _ in range(8):
            asked = sampler.ask(4)
            sampler.tell([score(config) for config in asked])
            found += asked
        return found

    first = search(0)
    assert first == search(0)
    assert all(0.01 <= config["beta"] <= 1.0 and config["gamma_beta_ratio"] in (0.0, 0.5, 1.0) for config in first)
    late, early = (np.mean([score(config) for config in part]) for part in (first[16:], first[:8]))
    assert late > early + 0.1
