"""Run `python -m MODULE ...` in a child of a process that has imported the libraries: a start costs no import.

The child has its own arguments, environment, working directory, standard output and errors, and ends as the command
does. For what depends on a fresh interpreter (hash seeds, import order, `sitecustomize`), start a real process.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["tests.servers.preloaded"])


@dataclass
class Command:
    """A running command.

    Attributes:
        process: the child.
        folder: of what it prints, in `out` and `err`.
    """

    process: BaseProcess
    folder: tempfile.TemporaryDirectory[str]

    def wait(self) -> subprocess.CompletedProcess[str]:
        """Wait for its end; return its exit status and all that it printed."""
        self.process.join(1800)
        self.process.kill()  # no effect on one that has ended; one that hangs fails its test by name
        self.process.join()
        out, err = ((Path(self.folder.name) / name).read_text() for name in ("out", "err"))
        status = self.process.exitcode
        assert status is not None
        self.folder.cleanup()
        return subprocess.CompletedProcess([self.process.name], status, out, err)


def start(module: str, *arguments: str, environment: Mapping[str, str] | None = None, cwd: Path = ROOT) -> Command:
    """Start a command; without an environment it has that of the tests."""
    folder = tempfile.TemporaryDirectory(prefix="command-")
    given = dict(os.environ if environment is None else environment)
    process = _SERVER.Process(target=_run, args=(module, arguments, given, str(cwd), folder.name), name=module)
    process.start()
    return Command(process, folder)


def run(
    module: str, *arguments: str, environment: Mapping[str, str] | None = None, cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return start(module, *arguments, environment=environment, cwd=cwd).wait()


def _run(module: str, arguments: tuple[str, ...], environment: dict[str, str], cwd: str, folder: str) -> None:
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(Path(folder) / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.path[0] = cwd
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        threading._shutdown()  # as an interpreter ends: threads, of which loky's ends its workers, then exit functions,
        atexit._run_exitfuncs()  # which a child of the server skips; `wandb` ends its own processes there
