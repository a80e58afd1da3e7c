"""Trial ids: pinned for ever, whatever keys are added or moved."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields, replace

import pytest

from harness.config.arms import ARMS
from harness.config.schema import GenerateConfig, RunConfig, TrainConfig
from harness.config.trial_id import (
    ADDED,
    FIRST_KEYS,
    NOT_HASHED,
    RENAMED,
    config_label,
    plain,
    registered_section,
    stored_trial_id,
    trial_id,
)
from harness.sweep.problems import compose_run, load_run

CONTENTS = {"base": "b", "train": "t", "golden": "g"}
OWN = ["model.path=some/model", "data.train=a.jsonl", "data.golden=b.jsonl"]

# Computed with the code of commit b4b16c8. They stand in the names of folders on users' disks: never change one.
PINNED = {
    "+method=dpo": "45e72d7d21f9",
    "+method=simpo": "b355fc1f4e29",
    "+method=dpo_norm": "c8d1aeee8e6d",
    "+method=dpo_margin": "dbf201a26adb",
    "+method=dpo_norm_margin": "35ad1950c9ef",
    "+method=simpo_no_margin": "d2e60932d810",
    "+method=simpo_sum": "369d8d41e601",
    "+method=simpo_sum_no_margin": "67d096676157",
    "+method=sft seed=0": "7e68e455a64a",
    "+method=dpo train.levers.share_prefix=false": "0830a60894f7",
    "+method=dpo train.levers.completion_head=false train.levers.fuse_adapters=false "
    "train.levers.group_lengths=false": "f37df263d464",
    "+method=dpo train.levers.reuse_base=false train.levers.metrics_steps=1": "45e72d7d21f9",
    "+method=simpo seed=7 method.beta=2.5 method.gamma_beta_ratio=0.55 method.length_norm=0.5 method.sft_weight=0.1 "
    "train.epochs=3 data.label_noise=0.2 data.max_train_pairs=32 data.max_bad_fraction=0.5 generate.temperature=0.7 "
    "generate.top_p=0.9 train.threads=2": "47cd114ca164",
    f"+method=dpo {' '.join(OWN)} train.tuning=full train.precision=bf16 model.revision=main": "7a793401b720",
}


@pytest.mark.parametrize("typed", PINNED)
def test_ids_are_those_of_the_first_version(typed: str) -> None:
    assert trial_id(compose_run(typed.split()), CONTENTS) == PINNED[typed]


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return load_run(["+method=dpo"])


@dataclass
class LaterTrain(TrainConfig):
    packing: bool = False


@dataclass
class LaterGenerate(GenerateConfig):
    stops: int = 0


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ADDED, "train.packing", False)
    monkeypatch.setitem(ADDED, "generate.stops", 0)


def with_later_keys(config: RunConfig, *, packing: bool = False, stops: int = 0) -> RunConfig:
    train = {field.name: getattr(config.train, field.name) for field in fields(config.train)}
    generate = {field.name: getattr(config.generate, field.name) for field in fields(config.generate)}
    return replace(config, train=LaterTrain(**train, packing=packing), generate=LaterGenerate(**generate, stops=stops))


@pytest.mark.usefixtures("added")
def test_a_later_key_changes_ids_only_where_it_differs_from_its_first_default(config) -> None:
    pinned = PINNED["+method=dpo"]
    assert trial_id(with_later_keys(config), CONTENTS) == pinned
    others = {
        trial_id(with_later_keys(config, packing=True), CONTENTS),
        trial_id(with_later_keys(config, stops=1), CONTENTS),
    }
    assert len(others | {pinned}) == 3


@pytest.mark.usefixtures("added")
def test_a_default_that_changes_later_changes_no_id(config) -> None:
    """The new default is a setting like any other: a trial that ran with the first one is not taken for it."""

    @dataclass
    class Changed(TrainConfig):
        packing: bool = True

    shared = {field.name: getattr(config.train, field.name) for field in fields(config.train)}
    first, now = (replace(config, train=Changed(**shared, packing=packing)) for packing in (False, True))
    assert trial_id(first, CONTENTS) == PINNED["+method=dpo"]
    assert trial_id(now, CONTENTS) == trial_id(with_later_keys(config, packing=True), CONTENTS) != PINNED["+method=dpo"]


def test_every_key_has_its_place_in_a_table(config) -> None:
    """A key that is added needs a row in `ADDED` (or in `NOT_HASHED`), an arm one in `FIRST_KEYS`."""
    assert {f"method.{arm}" for arm in ARMS} <= FIRST_KEYS.keys()
    for section in ("train", "generate", "data", "search"):
        placed = {f"{section}.{key}" for key in FIRST_KEYS[section]} | NOT_HASHED | ADDED.keys()
        assert {f"{section}.{key}" for key in as_written_then(config)[section]} <= placed


@pytest.mark.usefixtures("added")
def test_a_study_registers_a_later_key_only_where_it_differs_from_its_first_default(config) -> None:
    before = registered_section(config, "train")
    assert list(before) == list(FIRST_KEYS["train"])
    assert registered_section(with_later_keys(config), "train") == before
    assert registered_section(with_later_keys(config, packing=True), "train") == before | {"packing": True}
    assert list(registered_section(config, "data")) == list(FIRST_KEYS["data"])
    assert registered_section(config, "search") == plain(config.search)


def as_written_then(config: RunConfig) -> dict:
    """Return config.yaml as commit b4b16c8 wrote it."""
    values = plain(config)
    return values | {"train": {k: v for k, v in values["train"].items() if k != "levers"} | values["train"]["levers"]}


@pytest.mark.parametrize("typed", list(PINNED)[:2] + list(PINNED)[8:11])
def test_a_stored_config_gives_the_same_id_under_old_names_and_new_ones(typed: str) -> None:
    config = compose_run(typed.split())
    assert stored_trial_id(plain(config), CONTENTS) == PINNED[typed]
    assert stored_trial_id(as_written_then(config), CONTENTS) == PINNED[typed]


def test_every_first_key_is_still_there_or_has_a_row_in_the_table_of_renames(config) -> None:
    names = {f"train.{key}" for key in as_written_then(config)["train"]}
    names |= {
        f"{section}.{key}" for section in ("generate", "data", "search") for key in plain(getattr(config, section))
    }
    first = {f"{section}.{key}" for section in ("train", "generate", "data", "search") for key in FIRST_KEYS[section]}
    assert first <= names
    assert set(RENAMED.values()) <= first | NOT_HASHED


def test_each_computation_is_counted(config) -> None:
    seen = []
    sys.addaudithook(lambda event, args: seen.append(args[0]) if event == "harness.trial_id" else None)
    found = [trial_id(config, CONTENTS), stored_trial_id(plain(config), CONTENTS)]
    assert seen == found


@pytest.mark.parametrize(
    "change",
    [
        "method.beta=0.2",
        "method.learning_rate=1e-5",
        "seed=1",
        "train.epochs=3",
        "train.tuning=full",
        "data.label_noise=0.2",
        "generate.max_new_tokens=5",
        "train.engine=stock",
        "data.max_length=64",
    ],
)
def test_whatever_changes_the_result_changes_the_trial_id(change: str, config) -> None:
    assert trial_id(load_run(["+method=dpo", change]), CONTENTS) != trial_id(config, CONTENTS)


@pytest.mark.parametrize(
    "change",
    [
        "tracking=none",
        "results_dir=elsewhere",
        "study=x",
        "decide.margin=0.02",
        "question=why",
        "seeds=[1]",
        "data.max_bad_fraction=0.5",
        "train.threads=4",
        "train.checkpoint_steps=7",
    ],
)
def test_whatever_does_not_change_the_result_leaves_the_trial_id(change: str, config) -> None:
    assert trial_id(load_run(["+method=dpo", change]), CONTENTS) == trial_id(config, CONTENTS)


def test_the_contents_of_files_enter_the_trial_id_and_their_names_do_not() -> None:
    config = load_run(["+method=dpo", *OWN])
    moved = load_run(["+method=dpo", OWN[0], "data.train=elsewhere.jsonl", OWN[2]])
    assert trial_id(config, CONTENTS) == trial_id(moved, CONTENTS)
    assert trial_id(config, CONTENTS | {"train": "other"}) != trial_id(config, CONTENTS)


def test_a_label_shows_what_is_tuned() -> None:
    assert (
        config_label(load_run(["+method=simpo", "method.learning_rate=1e-4"]))
        == "beta=2,gamma_beta_ratio=0.5,lr=0.0001"
    )
    assert "sft_weight=0.1" in config_label(load_run(["+method=simpo", "method.sft_weight=0.1"]))
