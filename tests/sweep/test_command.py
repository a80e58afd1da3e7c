"""The commands as a user meets them: what is wrong is said in one message, with status 2, before anything is loaded."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import harness.sweep.app
from harness.config.paths import embedded_dir as study_dir
from harness.sweep.problems import load_run
from tests.conftest import SMALL

BOTH = ["+method=simpo,dpo"]
OWN = [f"data.train={study_dir() / 'train.jsonl'}", f"data.golden={study_dir() / 'golden.jsonl'}"]

REFUSED = {
    "a list where one value is meant": ([*BOTH, "study=[a]"], ["study=[a]", "must be a text"]),
    "one number for a list": ([*BOTH, "seeds=3"], ["seeds=3", "one or more different whole numbers", "such as [0,1]"]),
    "text in a list of numbers": ([*BOTH, "seeds=[a]"], ["seeds=[a]", "whole numbers", ">= 0"]),
    "splits, which the sweep decides": (
        [*BOTH, "evaluate=[dev]"],
        ["evaluate=[dev]: set by the sweep, cannot be typed", "--dev-only"],
    ),
    "a folder of costs, which the sweep decides": (
        [*BOTH, "cost_name=x"],
        ["cost_name=x: set by the sweep", "measure_costs=true"],
    ),
    "a family's name, which the sweep decides": ([*BOTH, "family.name=x"], ["family.name=x: set by the sweep"]),
    "a number named twice": ([*BOTH, "decide.looks=[3,3]"], ["decide.looks=[3,3]", "one or more different"]),
    "a name for a list": ([*BOTH, "score.scorers=dev"], ["score.scorers=dev", "must be a list of", "words"]),
    "a guard that is no mapping": ([*BOTH, "decide.guards=[3]"], ["decide.guards=[3]", "{metric: NAME, margin:"]),
    "a guard on a list": (
        [*BOTH, "decide.guards=[{metric: [checks], margin: 0.1}]"],
        ["decide.guards", "[checks]", "no such scorer"],
    ),
    "two guards on one metric": (
        [*BOTH, "decide.guards=[{metric: checks, margin: 0.1},{metric: checks, margin: 0.2}]"],
        ["decide.guards", "checks", "twice"],
    ),
    "a seed too large for the libraries": ([*BOTH, "seed=4294967296"], ["seed=4294967296", "<= 4294967295"]),
    "seeds too large for the libraries": ([*BOTH, "seeds=[0,4294967296]"], ["seeds=[0,4294967296]", "<= 4294967295"]),
    "a decoding seed too large": ([*BOTH, "generate.seed=4294967296"], ["generate.seed=4294967296", "<= 4294967295"]),
    "more threads than any machine has": ([*BOTH, "train.threads=1000000"], ["train.threads=1000000", "<= 1024"]),
    "top_p for greedy decoding": (
        [*BOTH, "generate.top_p=0.5"],
        ["generate.top_p=0.5", "generate.temperature=0 is greedy"],
    ),
    "a temperature that overflows": (
        [*BOTH, "generate.temperature=1e-30"],
        ["generate.temperature=1e-30", "0 (greedy) or at least 0.01"],
    ),
    "a project that W&B refuses": ([*BOTH, "tracking.project='a/b'"], ["tracking.project=a/b", "no `/`"]),
    "a project without a name": ([*BOTH, "tracking.project="], ["tracking.project=", "a name"]),
    "no values": ([*BOTH, "arms.dpo.beta=[]"], ["arms.dpo.beta=[]", "one value or more"]),
    "a key for all arms and for one": (
        [*BOTH, "method.beta=1", "arms.dpo.beta=2"],
        ["method.beta=1 arms.dpo.beta=2", "beta of dpo is given twice"],
    ),
    "an arm without a key": ([*BOTH, "arms.dpo=3"], ["arms.dpo=3", "arms.ARM.KEY=VALUE", "arms.dpo.beta=0.1"]),
    "a whole arm": ([*BOTH, "+arms.dpo={beta:1}"], ["+arms.dpo={beta:1}", "arms.ARM.KEY=VALUE"]),
    "all arms in one": ([*BOTH, "+arms={dpo:{beta:1}}"], ["+arms={dpo:{beta:1}}", "arms.ARM.KEY=VALUE"]),
    "the name of a method": ([*BOTH, "method.name=foo"], ["method.name=foo", "unknown key method.name"]),
    "a key taken away": ([*BOTH, "~seed"], ["~seed", "cannot be taken away"]),
    "a group taken away": ([*BOTH, "~tracking"], ["~tracking", "cannot be taken away"]),
    "several trackings": ([*BOTH, "tracking=none,wandb"], ["tracking=none,wandb", "only method", "several values"]),
    "a tracking with a plus": ([*BOTH, "+tracking=none"], ["+tracking=none", "write tracking=none"]),
    "a sweep without a plus": (["sweep=smoke"], ["sweep=smoke", "write +sweep=smoke"]),
    "a sweep by its path": (["+sweep=../sweeps/smoke"], ["+sweep=../sweeps/smoke", "no such sweep"]),
    "a word without a value": ([*BOTH, "seed"], ["seed: ", "write KEY=VALUE"]),
    "an argument of nothing": ([*BOTH, ""], ["'': ", "write KEY=VALUE"]),
    "a value that must be quoted": (
        [*BOTH, "data.train=a(1).jsonl"],
        ["data.train=a(1).jsonl", "quotes of its own", """'data.train="a(1).jsonl"'"""],
    ),
    "a comma in a text": ([*BOTH, "question=What, then?"], ["question=What, then?", """'question="What, then?"'"""]),
    "a pattern": ([*BOTH, "seed=glob(*)"], ["seed=glob(*)", "list the values"]),
    "another sweeper": ([*BOTH, "hydra/sweeper=basic"], ["hydra/sweeper=basic", "the sweeper plans paired trials"]),
    "another mode": ([*BOTH, "hydra.mode=RUN"], ["hydra.mode=RUN", "hydra/launcher"]),
    "another working folder": ([*BOTH, "hydra.job.chdir=true"], ["hydra.job.chdir=true", "hydra/launcher"]),
    "an unknown option": ([*BOTH, "--foo"], ["--foo", "unknown option", "--help"]),
    "another config": ([*BOTH, "--config-dir=x"], ["--config-dir=x", "unknown option"]),
    "a launcher that is not installed": (
        [*BOTH, "hydra/launcher=nope"],
        ["hydra/launcher=nope", "known: basic", "joblib"],
    ),
    "a study name too long for a folder": ([*BOTH, f"study={'a' * 300}"], ["study=aaa", "at most 200"]),
    "data that are not there": (
        [*BOTH, "data.train=no.jsonl", "data.golden=no.jsonl"],
        ["data.train=no.jsonl: no such file", "data.golden=no.jsonl: no such file"],
    ),
}


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Run a command that must be refused in an empty folder; return what it says."""

    def no_trial(*_args, **_more):
        pytest.fail("a trial was about to start")

    def run(module: str, overrides: list[str], *, untouched: bool = True) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(harness.sweep.app, "run_study", no_trial)
        monkeypatch.setattr(harness.sweep.app, "run_trial", no_trial)
        monkeypatch.setattr(sys, "argv", [module, *overrides])
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as stop:
            importlib.import_module(f"{module}.__main__").main()
        said = capsys.readouterr().err
        assert stop.value.code == 2, said
        assert said.startswith(f"{module}: ")
        assert "Traceback" not in said
        assert sorted(tmp_path.rglob("*")) == before or not untouched
        return said

    return run


@pytest.mark.parametrize("case", REFUSED)
def test_a_sweep_is_refused(case: str, refused) -> None:
    overrides, parts = REFUSED[case]
    said = refused("harness.sweep", overrides)
    for part in parts:
        assert part in said
    for foreign in ("choice(", "multirun", "ListConfig", "path=file:", "Lexer", "full_key"):
        assert foreign not in said
    lines = said.splitlines()
    assert len(set(lines)) == len(lines)


TRAIN_REFUSED = {
    "several seeds": (["+method=dpo", "seed=1,2"], ["seed=1,2", "harness.sweep"]),
    "a list that Hydra would sweep": (["+method=dpo", "seed=choice(1)"], ["seed=choice(1)", "harness.sweep"]),
    "a key by arm": (["+method=dpo", "arms.dpo.beta=1"], ["arms.dpo.beta=1", "write method.beta=... instead"]),
    "a method without a plus": (["method=dpo"], ["method=dpo", "write +method=dpo"]),
    "an unknown option": (["+method=dpo", "--foo"], ["--foo", "unknown option"]),
    "a launcher": (["+method=dpo", "hydra/launcher=basic"], ["hydra/launcher=basic", "harness.sweep"]),
    "an unknown key": (["+method=dpo", "train.epocs=1"], ["Did you mean train.epochs?"]),
    "a missing file": (["+method=dpo", *OWN[:1], "data.golden=no.jsonl"], ["data.golden=no.jsonl: no such file"]),
}


@pytest.mark.parametrize("case", TRAIN_REFUSED)
def test_one_trial_is_refused(case: str, refused) -> None:
    overrides, parts = TRAIN_REFUSED[case]
    said = refused("harness.train", overrides)
    for part in parts:
        assert part in said
    assert "multirun" not in said


@pytest.mark.parametrize("command", ["harness.sweep", "harness.train"])
@pytest.mark.parametrize("place", ["below a file", "where nothing can be made"])
def test_results_that_cannot_be_written_are_refused(command: str, place: str, tmp_path: Path, refused) -> None:
    import harness.train  # noqa: F401

    (tmp_path / "file").write_text("")
    results = tmp_path / "file" / "x" if place == "below a file" else Path("/proc/nowhere")
    said = refused(command, ["+method=dpo", "seed=0", *SMALL, f"results_dir={results}"])
    assert f"results_dir={results}: " in said


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A whole checkpoint, to be damaged."""
    folder = tmp_path / "model"
    shutil.copytree(study_dir(), folder, ignore=shutil.ignore_patterns("*.jsonl", "card.json"))
    return folder


DAMAGED = {
    "no tokenizer": ("tokenizer.json", None, "no tokenizer"),
    "a config that is no JSON": ("config.json", b"{", "config.json is not readable as JSON"),
    "a config of nothing": ("config.json", b"{}", "config.json names no model_type"),
    "weights cut off": ("model.safetensors", 1000, "model.safetensors is cut off"),
    "weights cut off in the last byte": ("model.safetensors", -1, "model.safetensors is cut off"),
    "weights that are something else": ("model.safetensors", b"<html>not found", "model.safetensors is cut off"),
    "a part that is missing": (
        "model.safetensors.index.json",
        b'{"weight_map": {"a": "model-2.safetensors"}}',
        "model-2.safetensors",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_checkpoint_is_refused_before_it_is_loaded(case: str, checkpoint: Path, refused) -> None:
    name, content, message = DAMAGED[case]
    path = checkpoint / name
    if content is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:content] if isinstance(content, int) else content)
    said = refused("harness.sweep", [*BOTH, f"model.path={checkpoint}", *OWN])
    assert f"model.path={checkpoint}: " in said
    assert message in said


def test_a_chat_template_that_is_no_text_is_refused(tmp_path: Path, refused) -> None:
    (tmp_path / "chat.jinja").write_bytes(b"\xff\xfe{{ messages }}")
    assert "model.chat_template=chat.jinja: not UTF-8" in refused(
        "harness.sweep", [*BOTH, "model.chat_template=chat.jinja"]
    )


def test_a_folder_of_pairs_is_read_and_one_without_any_is_refused(tmp_path: Path, refused, capsys) -> None:
    (tmp_path / "pairs").mkdir()
    said = refused("harness.sweep", [*BOTH, "data.path=pairs"])
    assert "data.path=pairs: cannot be loaded with datasets" in said
    rows = [{"prompt": f"question {i}", "chosen": "yes", "rejected": "no"} for i in range(60)]
    (tmp_path / "pairs" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    harness.sweep.app.run_sweep([*BOTH, "data.path=pairs", "plan=true", "seed=0"])
    assert "2 trials and the SFT base" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["my model", ".hidden", "größe", "a(1)", "."])
def test_a_study_is_named_after_any_model_folder(name: str, tmp_path: Path, monkeypatch, capsys) -> None:
    """Each trial gets the study's name as an override: a derived name must be one that may be given."""
    folder = tmp_path / name
    shutil.copytree(study_dir(), folder, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    arguments = [f"model.path='{name}'", *OWN]
    harness.sweep.app.run_sweep([*BOTH, *arguments, "plan=true", "seed=0"])
    study = capsys.readouterr().out.split(":")[0].removeprefix("study results/")
    assert load_run(["+method=dpo", *arguments, f"study={study}"]).study == study


def test_what_is_wrong_for_two_arms_is_said_once(refused) -> None:
    assert refused("harness.sweep", [*BOTH, "method.beta=0"]).count("method.beta=0") == 1


REAL = {  # command: the beginning of its message
    ("harness.sweep", *BOTH, "train.epocs=1"): "train.epocs=1: unknown key train.epocs",
    ("harness.sweep", "+method=dpo", "method.gamma_beta_ratio=1"): (
        "method.gamma_beta_ratio=1: gamma_beta_ratio is a key of simpo"
    ),
    ("harness.sweep", *BOTH, "data.train=no.jsonl", "data.golden=no.jsonl"): "data.train=no.jsonl: no such file",
    ("harness.sweep", "+sweep=nope"): "+sweep=nope: no such sweep",
    ("harness.train", "+method=dpo", "seed=1,2"): "seed=1,2: ",
}
RUN_ALL = """
import contextlib, io, json, runpy, sys

for command in json.loads(sys.argv[1]):
    sys.argv, errors, status = command, io.StringIO(), 0
    try:
        with contextlib.redirect_stderr(errors):
            runpy.run_module(command[0], run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        status = stop.code
    print(json.dumps([status, errors.getvalue(), "torch" in sys.modules]))
"""


@pytest.mark.slow
def test_the_real_commands_refuse_without_torch(tmp_path: Path) -> None:
    """Run as `python -m` runs them, one after the other in one process that has not imported torch."""
    command = [sys.executable, "-c", RUN_ALL, json.dumps([list(one) for one in REAL])]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    said = [json.loads(line) for line in ran.stdout.splitlines()]
    for (status, errors, torch), ((module, *_), message) in zip(said, REAL.items(), strict=True):
        assert (status, torch) == (2, False), errors
        assert errors.startswith(f"{module}: {message}")
        assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_one_trial_registers_its_own_command_and_answers_what_is_asked(tmp_path: Path) -> None:
    arguments = ["+method=dpo", "seed=1", *SMALL, f"results_dir={tmp_path}", "study=one", "--dev-only"]
    assert harness.sweep.app.run_single(arguments) == 0
    command = yaml.safe_load((tmp_path / "one" / "study.yaml").read_text())["command"]
    assert command.startswith("python -m harness.train +method=dpo seed=1 ")
    for folder in [tmp_path / "one" / "base", *(tmp_path / "one" / "trials").iterdir()]:
        rows = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
        assert {row["split"] for row in rows} == {"dev"}


@pytest.mark.slow
def test_a_sweep_registers_the_command_as_typed(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(harness.sweep.app, "run_study", lambda *given: None)
    arguments = [*BOTH, *SMALL, f"results_dir={tmp_path}", "study=s", "seed=0,1", "method.beta=1", "question='a, b'"]
    harness.sweep.app.run_sweep(arguments)
    command = yaml.safe_load((tmp_path / "s" / "study.yaml").read_text())["command"]
    assert command == "python -m harness.sweep " + " ".join(arguments[:-1]) + """ 'question='"'"'a, b'"'"''"""
