"""Configuration: everything wrong is refused before a model is loaded, in one message that says what is allowed."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace

import pytest

import harness.sweep.__main__
import harness.sweep.app
from harness.config.arms import ARMS
from harness.config.paths import CONF
from harness.config.paths import embedded_dir as study_dir
from harness.config.schema import RunConfig, Tuning
from harness.config.trial_id import plain
from harness.study.errors import UsageError
from harness.sweep.problems import find_warnings, load_run

OWN = ["model.path=some/model", "data.train=a.jsonl", "data.golden=b.jsonl"]

REFUSED = {
    "an unknown key": (["+method=dpo", "train.epocs=1"], ["train.epocs", "Did you mean train.epochs?"]),
    "an unknown key with a plus": (["+method=dpo", "+foo=1"], ["+foo=1", "unknown key foo", "method, model, data"]),
    "a key of the other arm": (
        ["+method=dpo", "method.gamma_beta_ratio=0.5"],
        ["gamma_beta_ratio is a key of simpo, ", ", not of dpo; ", "allowed for dpo: method.learning_rate, "],
    ),
    "a key of one arm for both": (
        ["+method=simpo,dpo", "method.gamma_beta_ratio=0.5"],
        ["not of dpo", "arms.simpo.gamma_beta_ratio=..."],
    ),
    "an unknown method": (["+method=dpp"], ["+method=dpp", "allowed: dpo, simpo, dpo_norm", "Did you mean dpo?"]),
    "the SFT base as a method": (["+method=sft"], ["no such method"]),
    "no method": (["seed=1"], ["no method", "+method=simpo,dpo"]),
    "a sweep that does not exist": (["+sweep=nope"], ["+sweep=nope", "sweeps/ has: ", "smoke"]),
    "an unknown tracking": (["+method=dpo", "tracking=x"], ["tracking=x", "allowed: none, wandb"]),
    "text for a number": (["+method=dpo", "train.epochs=abc"], ["train.epochs=abc", "whole number", ">= 1"]),
    "a fraction for a whole number": (["+method=dpo", "seed=1.5"], ["seed=1.5", "whole number"]),
    "a value out of range": (["+method=dpo", "method.beta=0"], ["method.beta=0", "out of range", "> 0"]),
    "infinity": (["+method=dpo", "method.beta=inf"], ["method.beta=inf", "out of range"]),
    "null where there must be a value": (["+method=dpo", "method.beta=null"], ["method.beta=null", "not be null"]),
    "an unknown choice": (["+method=dpo", "train.engine=fast"], ["train.engine=fast", "allowed: paired, stock"]),
    "a section for a value": (["+method=dpo", "train=3"], ["unknown key train", "train.epochs"]),
    "an axis that must be equal for both arms": (["+method=dpo", "train.epochs=1,2"], ["only method", "seed"]),
    "a continuous axis": (["+method=dpo", "method.beta=interval(1,2)"], ["interval", "list the values"]),
    "a missing model folder": (
        ["+method=dpo", "model.path=/no/such", *OWN[1:]],
        ["model.path=/no/such", "no such folder"],
    ),
    "a model without pairs": (["+method=dpo", "model.path=some/model"], ["needs your own pairs", "data.train"]),
    "pairs without golden": (["+method=dpo", *OWN[:2]], ["data.golden=null", "data.path"]),
    "a micro-batch that does not divide": (
        ["+method=dpo", "train.batch_size=8", "train.micro_batch_size=3"],
        ["train.micro_batch_size=3", "must divide train.batch_size=8"],
    ),
    "a missing chat template": (["+method=dpo", "model.chat_template=no.jinja"], ["model.chat_template=no.jinja"]),
    "splits that leave nothing": (
        ["+method=dpo", "data.golden_fraction=0.6", "data.dev_fraction=0.5"],
        ["data.golden_fraction=0.6", "leave nothing"],
    ),
    "a guard without a margin": (["+method=dpo", "decide.guards=[{metric: x}]"], ["decide.guards", "margin"]),
    "a guard with a margin that is no number": (
        ["+method=dpo", "decide.guards=[{metric: checks, margin: abc}]"],
        ["decide.guards", "margin: abc", "a number between 0 and 1"],
    ),
    "a guard on no scorer": (
        ["+method=dpo", "decide.guards=[{metric: vibes, margin: 0.1}]"],
        ["vibes", "no such scorer", "checks"],
    ),
    "a metric that no scorer gives": (
        ["+method=dpo", "decide.metric=vibes"],
        ["decide.metric=vibes", "scorers: checks"],
    ),
    "a method given twice": (["+method=dpo", "+method=simpo"], ["+method=dpo +method=simpo", "method=a,b"]),
    "a key given twice": (["+method=dpo", "train.epochs=1", "train.epochs=2"], ["train.epochs is given 2 times"]),
    "a value listed twice": (["+method=dpo", "seed=1,1"], ["seed=1,1", "listed twice"]),
    "two sweeps": (["+sweep=smoke,smoke"], ["a study has one question"]),
    "a null for an arm": (
        ["+method=dpo", "arms.dpo.learning_rate=null"],
        ["arms.dpo.learning_rate=null", "leave it out to take the default"],
    ),
    "a key of an arm that does not run": (
        ["+method=dpo", "arms.simpo.beta=2"],
        ["arms.simpo.beta=2: simpo is not among the arms of this sweep (dpo)"],
    ),
    "no seeds": (["+method=dpo", "seeds=[]"], ["seeds=[]", "one or more different whole numbers"]),
    "equal seeds": (["+method=dpo", "seeds=[1,1]"], ["seeds=[1,1]", "one or more different"]),
    "a value in a family": (["+method=dpo", "+family.value=1"], ["+family.value=1: set by the sweep", "family.values"]),
    "a lever under its old name": (
        ["+method=dpo", "train.share_prefix=false"],
        ["train.share_prefix=false: train.share_prefix was renamed: write train.levers.share_prefix"],
    ),
    "targets beside all layers": (
        ["+method=dpo", "train.lora_targets=[all-linear,q_proj]"],
        ["train.lora_targets=[all-linear,q_proj]: all-linear stands alone"],
    ),
    "targets that are no list": (["+method=dpo", "train.lora_targets=q_proj"], ["must be a list", "[q_proj,v_proj]"]),
    "no targets": (["+method=dpo", "train.lora_targets=[]"], ["train.lora_targets=[]", "must be a list"]),
    "a target that is no pattern": (
        ["+method=dpo", 'train.lora_targets=[v_proj,"(q_proj"]'],
        ["train.lora_targets=[v_proj,(q_proj]: (q_proj is neither the end of a layer's name nor"],
    ),
    "an unknown optimizer": (
        ["+method=dpo", "train.optimizer=sgd"],
        ["train.optimizer=sgd: allowed: auto, adamw, adamw_8bit"],
    ),
    "kernels that are not installed": (
        ["+method=dpo", "train.kernels=liger"],
        ["train.kernels=liger: liger-kernel is not installed; pip install 'dpo-simpo-harness[liger]'"],
    ),
    "a study outside of the results": (["+method=dpo", "study=../x"], ["study=../x", "no `/`"]),
    "a study without a name": (["+method=dpo", "study="], ["study=", "name of a folder"]),
    "a file for the results": (["+method=dpo", f"results_dir={__file__}"], ["results_dir=", "not a folder"]),
    "a revision of the embedded base": (["+method=dpo", "model.revision=v1"], ["model.revision=v1", "no revisions"]),
    "length_norm on the stock engine": (
        ["+method=simpo", "method.length_norm=0.5", "train.engine=stock"],
        ["method.length_norm=0.5", "train.engine=paired"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case: str) -> None:
    overrides, parts = REFUSED[case]
    with pytest.raises(UsageError) as error:
        load_run(overrides)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize("case", REFUSED)
def test_the_command_refuses(case: str, tmp_path, monkeypatch, capsys) -> None:
    """As the user meets it: status 2, the same message on stderr as typed, no traceback, and nothing written."""
    overrides, parts = REFUSED[case]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["harness.sweep", *overrides])
    with pytest.raises(SystemExit) as stop:
        harness.sweep.__main__.main()
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said.startswith("harness.sweep: ")
    assert "choice(" not in said
    for part in parts:
        assert part in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["+method=dpo,simpo"], "+method=dpo,simpo: harness.train runs one trial"),
        (["+method=dpo", "seed=1,2"], "seed=1,2: harness.train runs one trial"),
        (["+method=dpo", "arms.dpo.beta=1"], "write method.beta=... instead"),
        (["+sweep=smoke"], "sweep belongs to harness.sweep"),
        (["+method=dpo", "plan=true"], "plan belongs to harness.sweep"),
        (["+method=dpo", "method.gamma_beta_ratio=1"], "gamma_beta_ratio is a key of simpo"),
    ],
)
def test_one_trial_refuses_what_asks_for_several(overrides, message, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert harness.sweep.app.run_single(overrides) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_all_problems_are_named_at_once() -> None:
    with pytest.raises(UsageError) as error:
        load_run(["+method=dpo", "train.epocs=1", "method.beta=-1", "seed=x"])
    assert len(str(error.value).splitlines()) == 3


def test_every_arm_has_its_yaml_and_composes() -> None:
    assert {path.stem for path in (CONF / "method").glob("*.yaml")} == set(ARMS)
    for name, arm in ARMS.items():
        if arm.trainer:
            config = load_run([f"+method={name}"])
            assert config.method.name == name
            assert config.method.learning_rate


def test_arms_differ_in_the_method_section_only() -> None:
    simpo, dpo = plain(load_run(["+method=simpo"])), plain(load_run(["+method=dpo"]))
    assert {key for key in simpo if simpo[key] != dpo[key]} == {"method"}


def test_simpo_gamma_is_the_ratio_times_beta_and_the_sft_term_is_off() -> None:
    """SimPO repository, Llama-3-Instruct: beta 2.5, gamma/beta 0.55, hence gamma 1.375."""
    config = load_run(["+method=simpo", "method.beta=2.5", "method.gamma_beta_ratio=0.55"])
    arguments = ARMS["simpo"].trl_arguments(config.method)
    assert arguments["simpo_gamma"] == pytest.approx(1.375)
    assert arguments["cpo_alpha"] == 0.0


def test_defaults_are_the_published_ones_for_your_own_model() -> None:
    dpo = load_run(["+method=dpo", *OWN])
    assert (dpo.method.beta, dpo.method.learning_rate) == (0.1, 5e-6)
    full = load_run(["+method=dpo", *OWN, "train.tuning=full"])
    assert full.method.learning_rate == 5e-7
    simpo = load_run(["+method=simpo", *OWN])
    assert (simpo.method.beta, simpo.method.gamma_beta_ratio) == (2.0, 0.5)


def test_an_explicit_learning_rate_beats_the_profile() -> None:
    assert load_run(["+method=dpo", "method.learning_rate=3e-4"]).method.learning_rate == 3e-4


def test_a_learning_rate_known_to_collapse_warns() -> None:
    config = load_run(["+method=dpo", *OWN, "train.tuning=full", "method.learning_rate=5e-6"])
    assert "known to collapse" in find_warnings(config)[0]
    assert find_warnings(replace(config, train=replace(config.train, tuning=Tuning.lora))) == []
    assert find_warnings(load_run(["+method=dpo", *OWN, "train.tuning=full", "method.learning_rate=4.9e-6"])) == []


def test_the_embedded_study_runs_at_the_settings_that_its_card_recommends() -> None:
    card = json.loads((study_dir() / "card.json").read_text())["recommended"]
    for arm, rate in card["learning_rate"].items():
        config = load_run([f"+method={arm}"])
        assert config.method.learning_rate == rate
        assert (config.train.epochs, config.train.batch_size) == (card["epochs"], card["batch_size"])


def test_seed_0_is_a_seed() -> None:
    assert load_run(["+method=dpo", "seed=0"]).seed == 0
    assert load_run(["+method=dpo", "seed=7"]).seed == 7


# What a key is for


def sections(kind: type) -> Iterator[type]:
    """Yield a section of the config, and those in it."""
    yield kind
    for value in (getattr(kind(), field.name) for field in fields(kind)):
        if is_dataclass(value):
            yield from sections(type(value))


def test_every_key_has_a_sentence_in_its_section() -> None:
    for kind in {*sections(RunConfig), *(arm.config for arm in ARMS.values())}:
        documented = "".join(base.__doc__ or "" for base in kind.__mro__ if is_dataclass(base))
        named = {name for line in re.findall(r"^ {8}([\w, ]+): [\w`]", documented, re.M) for name in line.split(", ")}
        assert {field.name for field in fields(kind)} <= named, kind.__name__
