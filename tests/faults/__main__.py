"""Kill, starve and damage a small study again and again; the same command afterwards must end as if nothing had happened.

`python -m tests.faults --kills 200` is the long campaign (`make faults`); `tests/faults/test_campaign.py` runs a bounded part.
After each fault scores.csv and verdict.json must be those of the undisturbed study, byte for byte, and
`harness.verify` must find nothing.
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from tests.faults.clocks import clocks
from tests.faults.damage import any_damage, change_digit, damages, overwrite, truncate, zero
from tests.faults.dead_workers import LAUNCHERS, dead_workers
from tests.faults.disturbed import Undisturbed, ended, kill_at, log_of, prepare, start
from tests.faults.starved import file_sizes

Fault = Callable[[], "collections.Counter[str]"]


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


def two_at_once(study: Undisturbed, times: int, rng: random.Random) -> collections.Counter[str]:
    """Start two sweeps on one study, the second a moment after the first."""
    for _ in range(times):
        folder = study.new("twice")
        first = start(folder / "results")
        time.sleep(rng.uniform(0, study.seconds / 2))
        second = start(folder / "results")
        ends = [ended(first), ended(second)]
        assert ends == [0, 0], f"two at once: {ends}\n{log_of(folder)}"
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
            status = ended(start(folder / "results"))
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
    parser.add_argument("--at-once", type=int, default=1, help="kinds of files that are damaged in one study")
    parser.add_argument("--short", action="store_true", help="a few of each kind, for the tests")
    parser.add_argument("--only", nargs="*", help="run these faults alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, required=True, help="a folder that is not there yet")
    options = parser.parse_args(argv)
    prepare()
    rng = random.Random(options.seed)
    study = Undisturbed(options.work.resolve())
    faults = _short(study, rng) if options.short else _long(study, rng, options)
    for name, run in faults.items():
        if options.only and name not in options.only:
            continue
        began = time.monotonic()
        hits = run()
        seconds = time.monotonic() - began
        print(f"{name}: {hits.total()}, all equal to the undisturbed study, {seconds:.0f} s", flush=True)
        for where, count in sorted(hits.items()):
            print(f"{count:7}  {where}", flush=True)
    return 0


def _long(study: Undisturbed, rng: random.Random, options: argparse.Namespace) -> dict[str, Fault]:
    half = max(1, options.times // 2)
    return {
        "kill -9": lambda: kills(study, options.kills, rng),
        "SIGTERM": lambda: kills(study, options.times, rng, signal.SIGTERM),
        "truncated": lambda: damages(study, truncate, rng, options.at_once),
        "corrupted": lambda: damages(study, overwrite, rng, options.at_once),
        "zeroed": lambda: damages(study, zero, rng, options.at_once),
        "another digit": lambda: damages(study, change_digit, rng, options.at_once),
        "two at once": lambda: two_at_once(study, half, rng),
        "full disk": lambda: full_disk(study, options.times, rng),
        "file-size limits": lambda: file_sizes(study),
        "clock": lambda: clocks(study, half, rng),
        **{f"worker dies, {name}": partial(dead_workers, study, name, -(-options.times // 4)) for name in LAUNCHERS},
    }


def _short(study: Undisturbed, rng: random.Random) -> dict[str, Fault]:
    """A few of what takes seconds; other tests look at single files, dates of files and launchers."""
    return {
        "kill -9": lambda: kills(study, 2, rng),
        "damaged": lambda: damages(study, any_damage, rng, at_once=30),
        "file-size limits": lambda: file_sizes(study),
        "full disk": lambda: full_disk(study, 1, rng),
    }


if __name__ == "__main__":
    sys.exit(main())
