"""The dashboard over all studies of a folder: their state -> one page with a table, a forest plot and links.

The page needs no network. A server on loopback keeps it up to date while a sweep runs. Imports no torch.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from harness.config.arms import title
from harness.decide.recommend import recommendation_line
from harness.decide.words import MISSING, confidence, interval, plural, points
from harness.report.figures import drawing
from harness.report.page import json_in_page, page_script
from harness.report.style import INK, LINE, MUTED, PAPER, THEME, Drawing, inline
from harness.report.tables import Table, ranking_table
from harness.study.errors import UsageError
from harness.study.files import Json, Reader, bounds, mapping, number, strings, write_text
from harness.study.outcome import running_curves
from harness.study.registration import ALPHA
from harness.study.text import html, one_line, visible

PAGE = "dashboard.html"
MAX_STUDIES = 60  # in the forest plot
_TEMPLATES = Path(__file__).parent / "templates"
_SERVED = (".html", ".svg", ".md", ".json", ".csv")
_FOREST_WIDTH = 7.2  # inches
DECIDED, RUNNING, FAILED, UNDECIDED, BROKEN = "decided", "running", "failed trials", "no verdict", "unreadable"
# A study without a write for longer is not running; neither is one with files from the future, which a clock that was
# set back leaves.
_FRESH_SECONDS = 120.0


def render_dashboard(results: Path, *, live: bool = False) -> Path:
    """Write dashboard.html into a folder of studies; return its path.

    Raises:
        UsageError: no such folder.
    """
    path = results / PAGE
    write_text(path, dashboard_page(results, live=live))
    return path


def dashboard_page(results: Path, *, live: bool = False) -> str:
    """Return the page; a `live` one polls its own server for updates."""
    rows = read_overviews(results, now=time.time())
    script, source = page_script(_TEMPLATES / "dashboard.js")
    forest = draw_forest(rows)
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        text=html, figure=lambda drawing: inline(drawing.svg, THEME), table=lambda table: table.html({})
    )
    style = Markup((_TEMPLATES / "style.css").read_text(encoding="utf-8"))
    return environment.get_template("dashboard.html.j2").render(
        rows=[table_row(row) for row in rows],
        columns=COLUMNS,
        facts=json_in_page([_compared_facts(row) for row in rows]),
        forest=forest,
        rankings=[(one_line(row.name, 80), row.ranking) for row in rows if row.ranking],
        count=plural(len(rows), "study", "studies"),
        decided=sum(row.state == DECIDED for row in rows),
        live=live,
        script=script,
        script_source=source,
        style=style,
    )


COLUMNS = (
    "Study",
    "Verdict",
    "Recommendation",
    "Difference",
    "Interval",
    "State",
    "Question",
    "Model",
    "Golden set",
    "Seeds",
    "Trials",
    "Cost",
    "Date",
)


class TableRow(NamedTuple):
    """A study as a row of the page's table.

    Attributes:
        shown: (text, key to sort by) per column.
        link: address of its report; empty without one.
        problems: files that could not be read.
        name: of its folder.
    """

    shown: tuple[tuple[str, str | float | None], ...]
    link: str
    problems: tuple[str, ...]
    name: str


def table_row(row: Overview) -> TableRow:
    """Return a study as a row of the page's table."""
    verdict = f"{row.verdict} ({row.level})" if row.verdict else MISSING
    unfinished = row.planned is not None and row.state != DECIDED
    trials = f"{row.done}" + (f" of {row.planned}" if unfinished else "")
    trials += f", {row.failed} failed" if row.failed else ""
    trials += f", about {_duration(row.left)} left" if row.left else ""
    shown = (
        (one_line(row.name, 80), row.name),
        (verdict, row.verdict),
        (row.recommendation or MISSING, row.recommendation),
        (MISSING if row.difference is None else f"{points(row.difference)} points", row.difference),
        (_interval_cell(row), row.interval[0] if row.interval else None),
        (row.state, row.state),
        (one_line(row.question, 120), row.question),
        (_short_path(row.model), row.model),
        (_short_path(row.data), row.data),
        (row.seeds or MISSING, row.seeds),
        (trials, row.done),
        (_duration(row.seconds), row.seconds),
        (row.created[:16].replace("T", " ") or MISSING, row.created),
    )
    link = f"{quote(row.name)}/report.html" if row.has_report else ""
    return TableRow(shown, link, row.problems, row.name)


def _compared_facts(row: Overview) -> dict[str, str]:
    """Return the facts by which two studies are compared, as text."""
    named = {name: text for name, (text, _) in zip(COLUMNS, table_row(row).shown, strict=True)}
    arms = " against ".join(title(arm) for arm in row.arms[:2])
    more = {"Arms": arms, "Metric": one_line(row.metric, 80), "Margin": points(row.margin, signed=False)}
    return {name: visible(text) for name, text in {**named, **more}.items()}


def _interval_cell(row: Overview) -> str:
    return MISSING if row.interval is None else f"{confidence(row.alpha)}: {interval(row.interval)}"


def _short_path(path: str) -> str:
    """Return the last two parts of a path."""
    return one_line("/".join(path.rstrip("/").split("/")[-2:]), 60) or MISSING


def _duration(seconds: float | None) -> str:
    if not seconds:
        return MISSING
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@dataclass(frozen=True)
class Overview:
    """One study.

    Attributes:
        state: `decided`, `running`, `failed trials`, `no verdict` or `unreadable`.
        verdict: as in verdict.json; empty without one.
        difference, interval: first arm minus second, in [-1, 1]; None without a verdict.
        margin: None without a verdict.
        alpha: error rate of the interval.
        done, failed, planned: numbers of trials; `planned` is None where it is unknown.
        seconds: sum over all trials.
        left: estimated seconds to the end; None where unknown.
        problems: files that could not be read, a sentence each.
        recommendation: as the terminal prints it, with what stands beside it; empty without a verdict.
        ranking: all pairs of arms; None with two arms.
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
    alpha: float
    seeds: str
    done: int
    failed: int
    planned: int | None
    seconds: float
    left: float | None
    created: str
    has_report: bool
    problems: tuple[str, ...]
    recommendation: str
    ranking: Table | None


def read_overviews(results: Path, *, now: float) -> list[Overview]:
    """Return all studies below a folder, the newest first.

    Args:
        results: the folder that holds them.
        now: seconds since the epoch, to tell a running study from an abandoned one.

    Raises:
        UsageError: no such folder.
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
    seconds = [_spent_seconds(m) for m in manifests if m.get("status") in ("complete", "diverged")]
    planned = _planned_trials(settings)
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
        arms=tuple(strings(verdict.get("arms") or settings.get("contrast") or settings.get("arms"))),
        state=state,
        verdict=str(verdict.get("verdict", "")),
        level=str(verdict.get("level", "")),
        metric=str(verdict.get("metric") or settings.get("metric") or ""),
        difference=number(verdict.get("difference")),
        interval=bounds(verdict.get("ci95")),
        margin=number(verdict.get("margin")),
        alpha=number(verdict.get("alpha")) or ALPHA,
        seeds=", ".join(f"{arm} {count}" for arm, count in seeds.items()),
        done=done,
        failed=failed,
        planned=planned,
        seconds=sum(seconds),
        left=left,
        created=str(settings.get("created", "")),
        has_report=(folder / "report.html").is_file(),
        problems=tuple(reader.problems),
        recommendation=" ".join([recommendation_line(verdict), *_beside(verdict)]) if verdict else "",
        ranking=ranking_table(verdict),
    )


def _beside(verdict: Mapping[str, Json]) -> list[str]:
    """Return what stands beside a recommendation, as sentences."""
    return [f"Beside it: {one_line(text, 1000)}." for text in strings(verdict.get("caveats"))]


def _spent_seconds(manifest: Mapping[str, Json]) -> float:
    return sum(number(value) or 0.0 for value in mapping(manifest.get("seconds")).values())


def _planned_trials(settings: Mapping[str, Json]) -> int | None:
    """Return the number of registered trials: those of the tuning, and one config per arm with every deciding seed."""
    configs, seeds = mapping(settings.get("configs")), mapping(settings.get("seeds"))
    if not configs or not seeds:
        return None
    tuned = sum(len(strings(configs.get(arm))) for arm in strings(settings.get("tuned")))
    tuning_seeds = len(strings(settings.get("tuning_seeds")))
    return tuned * tuning_seeds + sum(len(strings(found)) for found in seeds.values())


def draw_forest(rows: Sequence[Overview]) -> Drawing | None:
    """Draw the studies that compare the same two arms as the newest one; None where none is decided."""
    decided = [row for row in rows if row.difference is not None and row.interval is not None and len(row.arms) > 1]
    shown = [row for row in decided if row.arms[:2] == decided[0].arms[:2]][:MAX_STUDIES]
    if not shown:
        return None
    first, second = (title(arm) for arm in shown[0].arms[:2])
    alt_text = " ".join(
        f"{one_line(row.name, 60)}: {points(row.difference)}, {interval(row.interval)}." for row in shown
    )
    left_out = len(decided) - len(shown)
    levels = ", ".join(sorted({confidence(row.alpha) for row in shown}))
    caption = (
        f"{first} minus {second} in points: the mean difference with the interval that decides ({levels}); "
        "hatched: the study's margin. Studies on different data are not repetitions of each other."
        + (f" {left_out} more have other arms, or are older." if left_out else "")
    )

    def draw(figure: Figure) -> None:
        _draw_studies(figure.subplots(), shown, f"{first} − {second}, percentage points")

    heading, height = f"{first} against {second} over studies", 0.34 * len(shown) + 1.0
    return drawing("forest", heading, alt_text, caption, _FOREST_WIDTH, height, draw)


def _draw_studies(axes: Axes, rows: Sequence[Overview], label: str) -> None:
    for place, row in enumerate(reversed(rows)):
        if row.difference is None or row.interval is None:
            continue
        if row.margin:
            low, width = -100 * row.margin, 200 * row.margin
            axes.barh(place, width, left=low, height=0.7, color=LINE, alpha=0.45, hatch="////", edgecolor=PAPER, lw=0)
        axes.plot([100 * end for end in row.interval], [place, place], color=INK, linewidth=1.6)
        axes.plot([100 * row.difference], [place], marker="D", markersize=6, color=PAPER, markeredgecolor=INK)
    axes.axvline(0, color=MUTED, linewidth=1)
    axes.set_yticks(range(len(rows)), [one_line(row.name, 40) for row in reversed(rows)])
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.set_xlabel(label)


def news(results: Path) -> str:
    """Return the update for a live page, as JSON: current rows, and the loss curves of running trials."""
    rows = read_overviews(results, now=time.time())
    shown = [{"name": row.name, "cells": [list(cell) for cell in table_row(row).shown]} for row in rows]
    return json.dumps({"rows": shown, "curves": running_curves(results, now=time.time())}, ensure_ascii=True)


class Handler(SimpleHTTPRequestHandler):
    """Serves the dashboard at `/`, its updates at `/news`, and the files of the reports, except hidden ones.

    The folder of results is `directory`, an absolute path without links.
    """

    def do_GET(self) -> None:
        """Answer one request."""
        if self.headers.get("Host", "").rpartition(":")[0] not in ("127.0.0.1", "localhost"):
            self.send_error(HTTPStatus.FORBIDDEN)  # another name that leads here is somebody else's page
        elif self.path in ("/", f"/{PAGE}"):
            self._send(dashboard_page(Path(self.directory), live=True), "text/html; charset=utf-8")
        elif self.path == "/news":
            self._send(news(Path(self.directory)), "application/json")
        elif self._may_read():
            super().do_GET()
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    def _may_read(self) -> bool:
        path = Path(self.translate_path(self.path))
        hidden = any(part.startswith(".") for part in path.relative_to(self.directory).parts)
        return (
            path.suffix in _SERVED and not hidden and path.is_file() and path.resolve().is_relative_to(self.directory)
        )

    def _send(self, text: str, kind: str) -> None:
        data = text.encode("utf-8", "backslashreplace")
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: str) -> None:
        """Log nothing: a line per request has no reader."""


def make_server(results: Path, port: int) -> ThreadingHTTPServer:
    """Return a server on loopback.

    Raises:
        UsageError: no such folder, or a port in use.
    """
    if not results.is_dir():
        raise UsageError(f"{results}: no such folder; give the folder that holds the studies")
    try:
        return ThreadingHTTPServer(("127.0.0.1", port), partial(Handler, directory=str(results.resolve())))
    except OSError as error:
        raise UsageError(f"--port {port}: {error.strerror}; choose another, or 0 for a free one") from error


def serve(results: Path, port: int) -> int:
    """Serve until interrupted."""
    with make_server(results, port) as server:
        print(f"http://127.0.0.1:{server.server_port}/ (Ctrl-C ends it)", file=sys.stderr)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("", file=sys.stderr)
    return 0
