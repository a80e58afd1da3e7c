"""A small study that is disturbed again and again, and the undisturbed one that every end is compared with.

A parent that has imported everything forks a child for each run, so that a kill costs no import.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.conftest import SMALL

# A study with all stages: two configs an arm are tuned, one is selected, fresh seeds confirm it.
STUDY = [
    *SMALL, "+method=simpo,dpo", "study=faults", "arms.dpo.beta=0.05,0.1", "arms.simpo.beta=2,3",
    "tuning_seeds=[7]", "seed=1,2", "train.checkpoint_steps=1",
]  # fmt: skip
RESULTS = ("scores.csv", "verdict.json")
SEALED = "trials/*/checkpoints/checkpoint-*/consumed.json"


def prepare() -> None:
    """Import what a run imports, so that children need not; no thread is started before the forks."""
    importlib.import_module("tests.servers.preloaded")
    from harness.study.log import prepare_process

    prepare_process()


def in_child(folder: Path, run: Callable[[], int]) -> int:
    """Start a function in a child process, its output in `folder/log.txt`; return the child's id."""
    child = os.fork()
    if child:
        return child
    status = 99
    try:
        os.setsid()
        log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        status = run()
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(status)


def start(results: Path, before: Callable[[], None] = lambda: None) -> int:
    """Start the study's command in a child process, after `before`; return its process id."""

    def run() -> int:
        from harness.sweep.__main__ import main

        sys.argv = ["harness.sweep", *STUDY, f"results_dir={results}"]
        before()
        try:
            main()
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    return in_child(results.parent, run)


def ended(child: int) -> int:
    """Wait for a child and return its exit status."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_at(results: Path, seconds: float, sign: int = signal.SIGKILL) -> str:
    """Run the command, and kill it after so many seconds; return where it was, or `ended` where it was faster."""
    child = start(results)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if os.waitpid(child, os.WNOHANG)[0]:
            return "ended"
        time.sleep(0.002)
    where = stage(results / "faults")
    try:
        os.killpg(child, sign)
    except ProcessLookupError:  # it has no group of its own yet
        os.kill(child, sign)
    os.waitpid(child, 0)
    return where


def kill_in_training(results: Path, trials: int) -> Path:
    """Run the command, and kill it in the training of a trial after so many; return the trial that has a checkpoint."""
    study = results / "faults"
    while True:
        child = start(results)
        while not os.waitpid(child, os.WNOHANG)[0]:
            if list(study.glob(SEALED)) and len(list(study.glob("trials/*"))) > trials:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                break
            time.sleep(0.001)
        sealed = list(study.glob(SEALED))
        if sealed:  # else the checkpoint was deleted just then: its trial had ended, and another is waited for
            return sealed[0].parents[2]
        assert not (study / "report.html").is_file(), "no trial was seen in its training"


def stage(study: Path) -> str:
    """Say how far a study has come, by the newest of its files."""
    files = [path for path in study.rglob("*") if path.is_file() and path.name not in (".lock", "log.txt")]
    if not files:
        return "before the first file"
    newest = max(files, key=_changed)
    place = newest.relative_to(study).parts[0]
    return f"{place}/{newest.name.lstrip('.').split('.')[0]}" if len(newest.relative_to(study).parts) > 1 else place


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


class Undisturbed:
    """The study as it ends where nothing happens, and what every other run of it is compared with."""

    def __init__(self, work: Path) -> None:
        self.work, self.folder = work, work / "undisturbed"
        self.folder.mkdir(parents=True)
        self.expected: dict[str, str] = {}
        began = time.monotonic()
        self.finishes(self.folder, what="the undisturbed study")
        self.seconds = time.monotonic() - began

    def finishes(self, folder: Path, *, what: str, before: Callable[[], None] = lambda: None) -> None:
        """Run the command to its end in a folder; require what it should find, and a report that is true."""
        status = ended(start(folder / "results", before))
        assert status == 0, f"{what}: exit status {status}\n{log_of(folder)}"
        self.is_right(folder, what=what)

    def is_right(self, folder: Path, *, what: str) -> None:
        """Require that a finished study has found what it should, byte for byte, and that verify has nothing to say."""
        found = {name: (folder / "results" / "faults" / name).read_text() for name in RESULTS}
        self.expected = self.expected or found
        for name, text in found.items():
            assert text == self.expected[name], f"{what}: {name} differs\n{log_of(folder)}"
        assert verified(folder) == 0, f"{what}: verify found problems\n{log_of(folder)}"

    def new(self, name: str, *, copy: Path | None = None) -> Path:
        """Return a folder for a study, empty or a copy of another one."""
        folder = self.work / name
        shutil.rmtree(folder, ignore_errors=True)
        if copy:
            shutil.copytree(copy, folder)
        else:
            folder.mkdir()
        return folder

    def half(self, name: str, rng: random.Random) -> tuple[Path, Path]:
        """Return a folder with a study that was killed in the training of some trial, and that trial's folder."""
        folder = self.new(name)
        return folder, kill_in_training(folder / "results", rng.randrange(4))


def verified(folder: Path) -> int:
    """Run `harness.verify` on the study in a folder and return its exit status."""
    return ended(in_child(folder, lambda: _verify(folder / "results" / "faults")))


def _verify(study: Path) -> int:
    from harness.verify import verify_study

    problems = verify_study(study)
    os.write(2, json.dumps(problems).encode())
    return 1 if problems else 0


def log_of(folder: Path) -> str:
    """Return the end of what the children said."""
    return (folder / "log.txt").read_text(errors="replace")[-3000:]
