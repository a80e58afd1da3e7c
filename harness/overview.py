"""All studies of a folder, a row each: what was asked, what came out, how far it is. Whatever is broken shows as such.

Reads study.yaml, verdict.json and the trials' manifests alone, so that hundreds of trials are quick. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.reader import Reader
from harness.records import UsageError
from harness.study import mapping
from harness.wording import bounds, number

DECIDED, RUNNING, FAILED, UNDECIDED, BROKEN = "decided", "running", "failed trials", "no verdict", "unreadable"
# A study in which nothing was written for longer is not running; nor is one of the future, which a clock that was set
# back leaves.
_FRESH_SECONDS = 120.0


@dataclass(frozen=True)
class Overview:
    """One study.

    Attributes:
        state: `decided`, `running`, `failed trials`, `no verdict` or `unreadable`.
        verdict: as in verdict.json; empty where there is none.
        difference, interval: the first arm minus the second, in [-1, 1]; None without a verdict.
        done, failed, planned: numbers of trials; `planned` is None where it is not known.
        seconds: of all trials together.
        left: seconds that are left, None where that cannot be told.
        problems: what could not be read.
    """

    name: str
    question: str
    model: str
    data: str
    arms: tuple[str, ...]
    state: str
    verdict: str
    level: str
    metric: str
    difference: float | None
    interval: tuple[float, float] | None
    margin: float | None
    alpha: float | None
    seeds: str
    done: int
    failed: int
    planned: int | None
    seconds: float
    left: float | None
    created: str
    has_report: bool
    problems: tuple[str, ...]


def read_overviews(results: Path, *, now: float) -> list[Overview]:
    """Return all studies below a folder, the newest first.

    Args:
        results: the folder that holds them.
        now: seconds since the epoch, to tell a running study from one that was left.

    Raises:
        UsageError: where there is no such folder.
    """
    if not results.is_dir():
        raise UsageError(f"{results}: no such folder; give the folder that holds the studies, such as results/")
    folders = [path for path in sorted(results.iterdir()) if path.is_dir() and (path / "study.yaml").exists()]
    rows = [_overview(folder, now) for folder in folders]
    return sorted(rows, key=lambda row: (row.created, row.name), reverse=True)


def _overview(folder: Path, now: float) -> Overview:
    reader = Reader(folder)
    settings, verdict = reader.mapping(folder / "study.yaml"), reader.mapping(folder / "verdict.json")
    places = [path for path in sorted(folder.glob("trials/*")) if path.is_dir()]
    manifests = [reader.mapping(path / "manifest.json") for path in places]
    failed = sum((path / "failure.json").is_file() for path in places)
    done = sum(m.get("status") in ("complete", "diverged") for m in manifests)
    seconds = [_seconds(m) for m in manifests if m.get("status") in ("complete", "diverged")]
    planned = _planned(settings)
    touched = [path.stat().st_mtime for path in [folder, *places, *folder.glob("trials/*/*.json*")]]
    running = min((abs(now - time) for time in touched), default=math.inf) < _FRESH_SECONDS and not verdict
    state = BROKEN if not settings else DECIDED if verdict else RUNNING if running else FAILED if failed else UNDECIDED
    missing = max(0, planned - done) if planned is not None else None
    left = missing * sum(seconds) / len(seconds) if missing and seconds and running else None
    seeds = mapping(verdict.get("n_seeds"))
    return Overview(
        name=folder.name,
        question=str(settings.get("question", "")),
        model=str(mapping(settings.get("model")).get("path", "")),
        data=str(mapping(mapping(settings.get("data")).get("golden")).get("path", "")),
        arms=tuple(str(arm) for arm in verdict.get("arms") or settings.get("contrast") or settings.get("arms") or ()),
        state=state,
        verdict=str(verdict.get("verdict", "")),
        level=str(verdict.get("level", "")),
        metric=str(verdict.get("metric") or settings.get("metric") or ""),
        difference=number(verdict.get("difference")),
        interval=bounds(verdict.get("ci95")),
        margin=number(verdict.get("margin")),
        alpha=number(verdict.get("alpha")),
        seeds=", ".join(f"{arm} {count}" for arm, count in seeds.items()),
        done=done,
        failed=failed,
        planned=planned,
        seconds=sum(seconds),
        left=left,
        created=str(settings.get("created", "")),
        has_report=(folder / "report.html").is_file(),
        problems=tuple(reader.problems),
    )


def _seconds(manifest: Mapping[str, Any]) -> float:
    return sum(number(value) or 0.0 for value in mapping(manifest.get("seconds")).values())


def _planned(settings: Mapping[str, Any]) -> int | None:
    """Return how many trials were registered: the tuning trials, and one config an arm with every deciding seed."""
    configs, seeds = mapping(settings.get("configs")), mapping(settings.get("seeds"))
    if not configs or not seeds:
        return None
    tuned = [arm for arm in settings.get("tuned") or () if arm in configs]
    tuning = settings.get("tuning_seeds") or []
    return sum(len(configs[arm]) for arm in tuned) * len(tuning) + sum(len(found) for found in seeds.values())
