"""Kill, starve and damage a small study again and again; the same command afterwards must end as if nothing had happened.

`python -m tests.faults --kills 200` is the long campaign (`make faults`); `tests/test_faults.py` runs a bounded part. A
parent that has imported everything forks a child for each run, so that a kill costs no import.
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.conftest import SMALL

# A study with all stages: two configs an arm are tuned, one is selected, fresh seeds confirm it.
STUDY = [
    *SMALL, "+method=simpo,dpo", "study=faults", "arms.dpo.beta=0.05,0.1", "arms.simpo.beta=2,3",
    "tuning_seeds=[7]", "seed=1,2", "train.checkpoint_steps=1",
]  # fmt: skip
RESULTS = ("scores.csv", "verdict.json")


def start(results: Path, *more: str) -> int:
    """Start the study's command in a child process; return its process id."""
    child = os.fork()
    if child:
        return child
    status = 99
    try:
        os.setsid()
        log = os.open(results.parent / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        from harness.sweep import run_sweep
        from harness.terminal import print_result

        status = max(print_result(found) for found in run_sweep([*STUDY, f"results_dir={results}", *more]))
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(status)


def finish(results: Path, *more: str) -> int:
    """Run the command to its end and return its exit status."""
    return os.waitstatus_to_exitcode(os.waitpid(start(results, *more), 0)[1])


def kill_at(results: Path, seconds: float, sign: int = signal.SIGKILL) -> str:
    """Run the command, and kill it after so many seconds; return where it was, or `ended` where it was faster."""
    child = start(results)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, _ = os.waitpid(child, os.WNOHANG)
        if ended:
            return "ended"
        time.sleep(0.002)
    where = stage(results / "faults")
    os.killpg(child, sign)
    os.waitpid(child, 0)
    return where


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


def outcome(results: Path) -> dict[str, str]:
    """Return what a study has found, to be compared byte for byte."""
    return {name: (results / "faults" / name).read_text() for name in RESULTS}


def truncate(path: Path, rng: random.Random) -> None:
    """Cut a file off somewhere, as a full disk or a crash of the machine does."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(rng.randrange(size) if size else 0)


class Undisturbed:
    """The study as it ends where nothing happens, and what every other run of it is compared with."""

    def __init__(self, work: Path) -> None:
        self.work, self.folder = work, work / "undisturbed"
        self.folder.mkdir(parents=True)
        began = time.monotonic()
        self.finishes(self.folder, expect=None)
        self.seconds = time.monotonic() - began
        self.expected = outcome(self.folder / "results")

    def finishes(self, folder: Path, *, expect: str | None = "the same", what: str = "the undisturbed study") -> None:
        """Run the command to its end in a folder, and compare what it found."""
        status = finish(folder / "results")
        log = (folder / "log.txt").read_text()[-3000:]
        assert status == 0, f"{what}: exit status {status}\n{log}"
        for name, text in outcome(folder / "results").items() if expect else ():
            assert text == self.expected[name], f"{what}: {name} differs\n{log}"

    def new(self, name: str, *, copy: bool = False) -> Path:
        """Return a folder for a study, empty or a copy of the undisturbed one."""
        folder = self.work / name
        shutil.rmtree(folder, ignore_errors=True)
        if copy:
            shutil.copytree(self.folder, folder)
        else:
            folder.mkdir()
        return folder


def kills(study: Undisturbed, count: int, rng: random.Random, sign: int = signal.SIGKILL) -> collections.Counter[str]:
    """Kill studies at random moments until so many kills have hit; return how many by where they hit."""
    hits: collections.Counter[str] = collections.Counter()
    while hits.total() < count:
        folder = study.new("killed")
        for _ in range(min(rng.randint(3, 12), count - hits.total())):
            where = kill_at(folder / "results", rng.uniform(0, study.seconds * rng.choice((0.1, 0.3, 1.0))), sign)
            if where == "ended":
                break
            hits[where] += 1
        study.finishes(folder, what=f"after kill {hits.total()}")
    return hits


def truncations(study: Undisturbed, rng: random.Random) -> collections.Counter[str]:
    """Cut off one file of each kind of a finished study, one at a time; return the kinds."""
    kinds: dict[str, list[Path]] = collections.defaultdict(list)
    results = study.folder / "results"
    for path in sorted(results.rglob("*")):
        if path.is_file() and path.name not in (".lock", "log.txt"):
            parts = path.relative_to(results).parts
            kind = "/".join(("TRIAL", *parts[3:]) if parts[1:2] == ("trials",) else parts[1:])
            kinds["reference log-probs" if path.suffix == ".safetensors" and "TRIAL" not in kind else kind].append(path)
    for kind, paths in kinds.items():
        folder = study.new("truncated", copy=True)
        truncate(folder / "results" / rng.choice(paths).relative_to(results), rng)
        study.finishes(folder, what=f"{kind} truncated")
    return collections.Counter(kinds.keys())


def two_at_once(study: Undisturbed, times: int, rng: random.Random) -> collections.Counter[str]:
    """Start two sweeps on one study, the second a moment after the first."""
    for _ in range(times):
        folder = study.new("twice")
        first = start(folder / "results")
        time.sleep(rng.uniform(0, study.seconds / 2))
        second = start(folder / "results")
        ends = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in (first, second)]
        assert ends == [0, 0], f"two at once: {ends}\n{(folder / 'log.txt').read_text()[-3000:]}"
        study.finishes(folder, what="two at once")
    return collections.Counter({"two sweeps at once": times})


def full_disk(study: Undisturbed, times: int, rng: random.Random) -> collections.Counter[str]:
    """Run on a file system that is too small for the study (tmpfs; needs root), then make room and run again."""
    if os.getuid() != 0:
        return collections.Counter()
    need = sum(path.stat().st_size for path in study.folder.rglob("*") if path.is_file())
    done = 0
    for _ in range(times):
        folder = study.new("full")
        size = f"size={int(need * rng.uniform(0.05, 0.95))}"
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", size, "none", str(folder)], check=False)
        if mounted.returncode:  # a container that may not mount
            return collections.Counter()
        try:
            status = finish(folder / "results")
            subprocess.run(["mount", "-o", f"remount,size={need * 20}", str(folder)], check=True)
            study.finishes(folder, what=f"after a full disk ({size}, exit status {status})")
            done += status != 0
        finally:
            subprocess.run(["umount", str(folder)], check=True)
    return collections.Counter({"full disk": done})


def main(argv: Sequence[str] | None = None) -> int:
    """Run the campaign and print where faults hit."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--times", type=int, default=10, help="of each other fault")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, required=True, help="a folder that is not there yet")
    options = parser.parse_args(argv)
    prepare()
    rng = random.Random(options.seed)
    study = Undisturbed(options.work)
    faults = {
        "kill -9": lambda: kills(study, options.kills, rng),
        "SIGTERM": lambda: kills(study, options.times, rng, signal.SIGTERM),
        "truncated": lambda: truncations(study, rng),
        "two at once": lambda: two_at_once(study, max(1, options.times // 2), rng),
        "full disk": lambda: full_disk(study, options.times, rng),
    }
    for name, run in faults.items():
        hits = run()
        print(f"{name}: {hits.total()}, all equal to the undisturbed study", flush=True)
        for where, count in sorted(hits.items()):
            print(f"{count:7}  {where}")
    return 0


def prepare() -> None:
    """Import what a run imports, so that children need not; no thread is started before the forks."""
    import torch

    import harness.generate
    import harness.heldout
    import harness.report
    import harness.sweep
    import harness.train
    import harness.trainers

    torch.set_num_threads(1)
    harness.sweep.prepare_process()


if __name__ == "__main__":
    sys.exit(main())
