"""Clocks that jump: the study runs with a clock that is set back and forth by days, over files of any date."""

from __future__ import annotations

import collections
import datetime
import os
import random
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.faults.disturbed import Undisturbed, ended, in_child, log_of

_DAY = 86400.0


def jumping_clock(seed: int) -> Callable[[], None]:
    """Return a function that lets the clock of its process jump by up to 40 days at every reading."""

    def install() -> None:
        rng, real = random.Random(seed), time.time

        def now() -> float:
            return real() + rng.uniform(-40, 40) * _DAY

        class Jumping(datetime.datetime):
            @classmethod
            def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
                return datetime.datetime.fromtimestamp(now(), tz)

        time.time, time.time_ns = now, lambda: int(now() * 1e9)
        for name, module in list(sys.modules.items()):
            if name.startswith("harness.") and getattr(module, "datetime", None) is datetime.datetime:
                module.datetime = Jumping  # type: ignore[attr-defined]

    return install


def any_dates(folder: Path, rng: random.Random) -> None:
    """Give all files and folders dates between ten years ago and in ten years."""
    for path in folder.rglob("*"):
        when = time.time() + rng.uniform(-3650, 3650) * _DAY
        os.utime(path, (when, when))


def clocks(study: Undisturbed, times: int, rng: random.Random) -> collections.Counter[str]:
    """Kill a study in a trial's training, give its files any dates, and go on with a clock that jumps."""
    for _ in range(times):
        folder, _ = study.half("clock", rng)
        any_dates(folder, rng)
        study.finishes(folder, what="a clock that jumps", before=jumping_clock(rng.randrange(2**32)))
        any_dates(folder, rng)
        study.finishes(folder, what="a clock that jumps, and a finished study")
        assert ended(in_child(folder, partial(_dashboard, folder / "results"))) == 0, log_of(folder)
        assert "faults" in (folder / "results" / "dashboard.html").read_text()
    return collections.Counter({"clock and dates of files": times})


def _dashboard(results: Path) -> int:
    from harness.report.dashboard import news, render_dashboard

    jumping_clock(0)()
    render_dashboard(results)
    news(results)
    return 0
