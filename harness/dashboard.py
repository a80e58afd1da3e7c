"""One page over all studies: a table to sort and filter, a forest plot, any two studies compared, links to the reports.

Command: `python -m harness.dashboard results/ [--serve]`. Imports no torch, needs no network.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from harness.browser import json_in_page, page_script
from harness.forest import draw_forest
from harness.outside import in_one_sentence
from harness.overview import DECIDED, Overview, read_overviews
from harness.palette import THEME, title
from harness.records import UsageError, write_text
from harness.svg import inline
from harness.untrusted import html, one_line, visible
from harness.wording import MISSING, confidence, interval, plural, points

_TEMPLATES = Path(__file__).parent / "templates"
PAGE = "dashboard.html"


def render_dashboard(results: Path, *, live: bool = False) -> Path:
    """Write dashboard.html into a folder of studies; return its path.

    Raises:
        UsageError: where there is no such folder.
    """
    path = results / PAGE
    write_text(path, dashboard_page(results, live=live))
    return path


def dashboard_page(results: Path, *, live: bool = False) -> str:
    """Return the page; `live` lets it ask its own server for news."""
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
    environment.filters.update(text=html, figure=lambda drawing: inline(drawing.svg, THEME))
    style = Markup((_TEMPLATES / "style.css").read_text(encoding="utf-8"))
    return environment.get_template("dashboard.html.j2").render(
        rows=[cells(row) for row in rows],
        columns=COLUMNS,
        facts=json_in_page([facts(row) for row in rows]),
        forest=forest,
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


def cells(row: Overview) -> dict[str, Any]:
    """Return a row's cells as (text, key to sort by), its link and its problems."""
    verdict = f"{row.verdict} ({row.level})" if row.verdict else MISSING
    unfinished = row.planned is not None and row.state != DECIDED
    trials = f"{row.done}" + (f" of {row.planned}" if unfinished else "")
    trials += f", {row.failed} failed" if row.failed else ""
    trials += f", about {_duration(row.left)} left" if row.left else ""
    shown = (
        (one_line(row.name, 80), row.name),
        (verdict, row.verdict),
        (MISSING if row.difference is None else f"{points(row.difference)} points", row.difference),
        (_interval(row), row.interval[0] if row.interval else None),
        (row.state, row.state),
        (one_line(row.question, 120), row.question),
        (_tail(row.model), row.model),
        (_tail(row.data), row.data),
        (row.seeds or MISSING, row.seeds),
        (trials, row.done),
        (_duration(row.seconds), row.seconds),
        (row.created[:16].replace("T", " ") or MISSING, row.created),
    )
    link = f"{quote(row.name)}/report.html" if row.has_report else ""
    return {"cells": shown, "link": link, "problems": row.problems, "name": row.name}


def facts(row: Overview) -> dict[str, str]:
    """Return what is compared of two studies, as text."""
    named = {name: text for name, (text, _) in zip(COLUMNS, cells(row)["cells"], strict=True)}
    arms = " against ".join(title(arm) for arm in row.arms[:2])
    more = {"Arms": arms, "Metric": one_line(row.metric, 80), "Margin": points(row.margin, signed=False)}
    return {name: visible(text) for name, text in {**named, **more}.items()}


def _interval(row: Overview) -> str:
    return MISSING if row.interval is None else f"{confidence(row.alpha or 0.05)}: {interval(row.interval)}"


def _tail(path: str) -> str:
    """Return the last parts of a path: what tells it from others."""
    return one_line("/".join(path.rstrip("/").split("/")[-2:]), 60) or MISSING


def _duration(seconds: float | None) -> str:
    if not seconds:
        return MISSING
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@in_one_sentence("harness.dashboard")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m harness.dashboard",
        description="One page over all studies of a folder: dashboard.html in it.",
        epilog="Example: python -m harness.dashboard results/ --serve",
    )
    parser.add_argument("results", type=Path, help="the folder that holds the studies")
    parser.add_argument(
        "--serve", action="store_true", help="serve it on loopback, and show a running sweep's progress"
    )
    parser.add_argument("--port", type=int, default=8765, help="for --serve (default 8765; 0 takes a free one)")
    options = parser.parse_args(argv)
    try:
        if options.serve:
            from harness.serve import serve

            return serve(options.results, options.port)
        print(render_dashboard(options.results))
    except UsageError as error:
        print(f"harness.dashboard: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"harness.dashboard: cannot write the page: {error}; free the disk or the folder", file=sys.stderr)
        return 1
    return 0


def news(results: Path) -> str:
    """Return what a live page asks for: the rows anew, and the loss curves of trials that run, as JSON."""
    from harness.live import running_curves

    rows = read_overviews(results, now=time.time())
    shown = [{"name": row.name, "cells": [list(cell) for cell in cells(row)["cells"]]} for row in rows]
    return json.dumps({"rows": shown, "curves": running_curves(results, now=time.time())}, ensure_ascii=True)


if __name__ == "__main__":
    sys.exit(main())
