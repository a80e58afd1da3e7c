"""Configs of a sweep, composed from what they share, are those that Hydra composes one by one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hydra import compose

from harness.config.overrides import check_overrides
from harness.data.inputs import Inputs
from harness.study.errors import UsageError
from harness.sweep.design import Composer, designs_of, expand, shared_overrides
from harness.sweep.problems import compose_run, composing

COMMON = ["study=s", "train.batch_size=8", "data.max_train_pairs=16"]


@pytest.fixture
def composer() -> Iterator[Composer]:
    with composing():
        yield Composer()


PARAMS = [
    ("dpo", {"beta": 0.1, "learning_rate": 1e-5}),
    ("dpo", {"beta": "0.3"}),
    ("simpo", {"beta": 2, "gamma_beta_ratio": 0.5, "learning_rate": "2e-4"}),
    ("simpo", {"learning_rate_factor": 3.0, "length_norm": 0}),
    ("simpo", {}),
]


@pytest.mark.parametrize(("arm", "params"), PARAMS)
def test_a_config_is_the_one_that_hydra_composes(arm: str, params: dict, composer: Composer) -> None:
    composer.compose([*COMMON, f"+method={arm}"], {"beta": 7.0})  # what an earlier config set must not stay
    typed = [f"method.{key}={value}" for key, value in params.items()]
    found = composer.compose([*COMMON, f"+method={arm}"], params)
    assert found == compose_run([*COMMON, f"+method={arm}", *typed])


BAD = [("dpo", {"beta": "two"}), ("dpo", {"gamma_beta_ratio": 0.5}), ("dpo", {"beta": -1.0}), ("simpo", {"bet": 1})]


@pytest.mark.parametrize(("arm", "params"), BAD)
def test_a_config_that_cannot_be_is_refused_as_hydra_does(arm: str, params: dict, composer: Composer) -> None:
    with pytest.raises(UsageError) as expected:
        compose_run([f"+method={arm}", *(f"method.{key}={value}" for key, value in params.items())])
    with pytest.raises(UsageError) as found:
        composer.compose([f"+method={arm}"], params)
    assert str(found.value) == str(expected.value)
    assert next(iter(params)) in str(found.value)


def test_the_problems_of_all_configs_are_told_at_once(composer: Composer) -> None:
    jobs = [(["+method=dpo"], {"beta": -1.0}), (["+method=dpo"], {"beta": 0.1}), (["+method=simpo"], {"beta": -2.0})]
    with pytest.raises(UsageError) as found:
        composer.compose_all(jobs)
    assert [line.split(":")[0] for line in str(found.value).splitlines()] == ["method.beta=-1.0", "method.beta=-2.0"]


@pytest.mark.parametrize("varied", ["generate.temperature", "data.label_noise", "train.weight_decay"])
def test_each_study_of_a_family_keeps_its_own_value(varied: str, composer: Composer) -> None:
    """Regression: all studies of a family over a key of `generate` were launched with the last value."""
    arguments = ["+method=dpo", "seed=5", f"family.key={varied}", "family.values=[0.1,0.3]"]
    parsed = check_overrides(arguments)
    master = compose("sweep", shared_overrides(parsed), return_hydra_config=True)
    designs = designs_of(expand(parsed, master), master, composer, Inputs(), lambda config, inputs: "s")
    section, key = varied.split(".")
    assert [(d.study.name, getattr(getattr(d.any, section), key)) for d in designs] == [
        (f"s-{key}-0.1", 0.1),
        (f"s-{key}-0.3", 0.3),
    ]
