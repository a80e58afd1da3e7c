"""No secret of the environment reaches a file or the terminal, whether trials succeed or fail with it in their mouths."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import os
import secrets
import subprocess
import sys
import traceback
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from harness.config.schema import JudgeConfig
from harness.study.errors import UsageError
from harness.study.files import read_json
from harness.sweep.app import run_sweep
from harness.sweep.launch import run_job
from tests.conftest import SMALL, overriding
from tests.servers.judge import judge_server, prefers

ROOT = Path(__file__).resolve().parents[2]
NAMES = (
    *("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "OPENAI_API_KEY", "ANTHROPIC_API_KEY"),
    *("AWS_SECRET_ACCESS_KEY", "GITHUB_TOKEN", "SLURM_JWT", "MY_JUDGE_KEY", "DATABASE_PASSWORD"),
)
# Loaded by every process of the sweep: each trial talks of its secrets in all the ways that libraries have, and DPO's
# fail with two of them in the message.
TALKATIVE = """
import os, pathlib, sys

if sys.argv[:1] == ["-m"]:
    import json, logging, warnings
    import harness.train.run, harness.sweep.stages, harness.study.log

    train_arm = harness.train.run.train_arm

    def train_and_talk(*args, **more):  # in the trial's process, or in each of several that train it
        print("while it trains", os.environ["AWS_SECRET_ACCESS_KEY"], flush=True)
        print("while it trains", os.environ["HF_TOKEN"], file=sys.stderr, flush=True)
        return train_arm(*args, **more)

    harness.train.run.train_arm = train_and_talk
    real = harness.sweep.stages.score_trial

    def score_trial(folder, *args, **more):
        secret = os.environ
        print("printed", secret["HF_TOKEN"])
        print("printed", secret["HUGGING_FACE_HUB_TOKEN"], file=sys.stderr)
        logging.getLogger("transformers.some").warning("logged %s", secret["AWS_SECRET_ACCESS_KEY"])
        warnings.warn("warned of " + secret["GITHUB_TOKEN"])
        harness.study.log.LOG.info("%s", secret["SLURM_JWT"])
        harness.study.log.say("said " + secret["ANTHROPIC_API_KEY"])
        if json.loads((pathlib.Path(folder) / "manifest.json").read_text())["arm"] == "dpo":
            raise RuntimeError(f"refused: {secret['OPENAI_API_KEY']}, {secret['DATABASE_PASSWORD']}")
        return real(folder, *args, **more)

    harness.sweep.stages.score_trial = score_trial
"""


def contents(path: Path) -> Iterator[bytes]:
    """Yield a file's bytes, and what is packed in them."""
    data = path.read_bytes()
    yield data
    for unpack in (gzip.decompress, bz2.decompress):
        with contextlib.suppress(OSError, EOFError):
            yield unpack(data)
    if zipfile.is_zipfile(io.BytesIO(data)):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            yield from (archive.read(name) for name in archive.namelist())


def leaks(folder: Path, planted: Mapping[str, str]) -> set[tuple[str, str]]:
    """Return the variables whose value stands in a file below the folder or in a file's name, with the file."""
    found = set()
    for path in (path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        for data in (name.encode(), *contents(path)):
            found |= {(variable, name) for variable, value in planted.items() if value.encode() in data}
    return found


def test_the_search_finds_what_is_there(tmp_path: Path) -> None:
    planted = {name: secrets.token_hex(20) for name in NAMES}
    plain, *packed, named = NAMES[:5]
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "plain.wandb").write_bytes(b"\x00\xff" + planted[plain].encode() + b"\xff")
    (tmp_path / "x.gz").write_bytes(gzip.compress(planted[packed[0]].encode()))
    (tmp_path / "x.bz2").write_bytes(bz2.compress(planted[packed[1]].encode()))
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("inside", planted[packed[2]])
    (tmp_path / planted[named]).touch()
    files = ("a/plain.wandb", "x.gz", "x.bz2", "x.zip", planted[named])
    assert leaks(tmp_path, planted) == set(zip(NAMES[:5], files, strict=True))


def sweep(tmp_path: Path, planted: Mapping[str, str], url: str, *more: str) -> subprocess.CompletedProcess:
    """Run a sweep as a user does, with everything that it may write below `tmp_path`."""
    for name in ("home", "work", "code"):
        (tmp_path / name).mkdir()
    (tmp_path / "code" / "sitecustomize.py").write_text(TALKATIVE)
    judge = [f"score.judge.base_url={url}", "score.judge.model=fake", "score.judge.max_retries=0"]
    judge += ["score.judge.api_key_env=MY_JUDGE_KEY", "score.judge.concurrency=1"]
    settings = ["tracking=wandb", f"results_dir={tmp_path / 'results'}", "study=s", *judge, *more]
    command = [sys.executable, "-m", "harness.sweep", "+method=simpo,dpo", *overriding(SMALL, *settings)]
    mine = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "HF_", "XDG"))}
    mine |= {"HOME": str(tmp_path / "home"), "PYTHONPATH": os.pathsep.join([str(tmp_path / "code"), str(ROOT)])}
    mine |= {"HF_HUB_OFFLINE": "1", "TMPDIR": str(tmp_path / "work"), **planted}
    return subprocess.run(command, cwd=tmp_path / "work", env=mine, capture_output=True, text=True, check=False)


WAYS = {
    "in_this_process": ("seed=0,1",),
    # One seed: each trial is a job whose training starts two more processes.
    "in_processes_of_their_own": (
        *("seed=0", "hydra/launcher=submitit_local", "accelerate=ddp", "train.micro_batch_size=2"),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_no_secret_is_in_any_file_or_on_the_terminal(way: str, tmp_path: Path) -> None:
    planted = {name: secrets.token_hex(20) for name in NAMES}
    assert JudgeConfig().api_key_env in planted
    says = prefers(lambda first, second: len(second) - len(first))
    asked = iter(range(10**6))

    def judge(request):
        refusal = {"error": {"message": f"the key {planted['MY_JUDGE_KEY']} is worn out"}}
        return (500, {}, refusal) if next(asked) == 0 else says(request)

    with judge_server(judge) as server:
        ended = sweep(tmp_path, planted, server.url, *WAYS[way])
    assert ended.returncode == 1, ended.stdout + ended.stderr
    (tmp_path / "out.txt").write_text(ended.stdout)
    (tmp_path / "err.txt").write_text(ended.stderr)
    study = tmp_path / "results" / "s"
    failures = [read_json(path) for path in study.glob("trials/*/failure.json")]
    seeds = len(WAYS[way][0].split(","))
    assert [failure["arm"] for failure in failures] == ["dpo"] * seeds
    for failure in failures:
        assert failure["message"] == "refused: ***, ***"
        assert "Traceback" in failure["traceback"]
    assert "refused: ***, ***" in ended.stdout
    terminals = [ended.stderr, *(path.read_text() for path in tmp_path.rglob("*_log.err"))]  # submitit's of each job
    assert any("said ***" in text for text in terminals)
    logs = [path.read_text() for path in study.glob("*/*/log.txt")]
    assert any(
        all(f"{how} ***" in log for how in ("while it trains", "printed", "logged", "warned of", "said"))
        for log in logs
    )
    assert "the key *** is worn out" in ended.stdout  # what the judge refused one request for
    assert len(list(study.glob("wandb/offline-run-*/*.wandb"))) >= 1 + 2 * seeds
    known = {name for _, name in leaks(tmp_path, {"project": "dpo-vs-simpo", "error": "refused: ***, ***"})}
    assert {Path(name).suffix for name in known} >= {".wandb", ".json", ".txt"}  # the search reads what was written
    assert leaks(tmp_path, planted) == set()


def test_an_address_with_a_password_is_refused_since_configs_are_written(tmp_path: Path) -> None:
    address = "score.judge.base_url=https://somebody:opensesame@judges.example/v1"
    with pytest.raises(UsageError, match=r"score\.judge\.base_url: holds a name or a password") as refused:
        run_sweep([*SMALL, "+method=simpo,dpo", f"results_dir={tmp_path}", "score.judge.model=m", address])
    assert "opensesame" not in str(refused.value)
    assert not any(tmp_path.iterdir())


def test_what_a_job_raises_has_no_secret_in_it_whichever_launcher_keeps_it(monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", secret := secrets.token_hex(20))
    monkeypatch.setattr(
        "harness.sweep.launch.read_trial", lambda path: (_ for _ in ()).throw(OSError(f"refused {secret}"))
    )
    with pytest.raises(RuntimeError) as raised:
        run_job(OmegaConf.create({"trial": "x.json"}))
    assert "".join(traceback.format_exception(raised.value)).count(secret) == 0
    assert str(raised.value) == "OSError: refused ***"
