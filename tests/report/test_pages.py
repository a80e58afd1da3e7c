"""The pages in a real browser: no error, no request, fluent with 5,000 prompts, readable without scripts, accessible."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, sync_playwright

from harness.report.page import render_report
from harness.study.files import read_jsonl, write_jsonl
from tests.report.test_page import HOSTILE
from tests.study_fixture import build_study

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: pages are not opened in a browser")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


class Opened:
    """A page with what it complained of and asked for."""

    def __init__(self, browser: Browser, path: Path, **context: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1200, "height": 900}} | context)
        self.page: Page = self.context.new_page()
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda m: self.errors.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("dialog", lambda dialog: self.errors.append(f"dialog: {dialog.message}") or dialog.dismiss())
        self.page.goto(f"file://{path}")

    def said(self) -> str:
        return self.page.inner_text("#completions-count")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return render_report(build_study(tmp_path_factory.mktemp("pages") / "letters")).resolve()


def test_the_report_loads_without_an_error_or_a_request(browser, report) -> None:
    opened = Opened(browser, report)
    assert opened.errors == []
    assert opened.requests == [f"file://{report}"]
    assert opened.page.locator("#headline").inner_text() == "SimPO beats DPO"
    assert opened.page.locator("#completions-static").is_hidden()


def test_search_and_filters_find_what_they_say(browser, report) -> None:
    opened = Opened(browser, report)
    page = opened.page
    assert opened.said() == "Prompts 1 to 20 of 60"
    page.fill("#completions-search", "QUESTION 7)")
    assert opened.said() == "Prompts 1 to 6 of 6 found in 60"  # 7, 17, 27, ...: every word, anywhere
    assert all("7)" in prompt for prompt in page.locator("#completions-list .prompt").all_inner_texts())
    page.fill("#completions-search", "no such words")
    assert opened.said() == "No prompt is like that."
    page.fill("#completions-search", "")
    counts = {}
    for name in ("all", "differ", "one", "two", "flagged"):
        page.select_option("#completions-filter", name)
        text = opened.said()
        counts[name] = int(text.split(" of ")[1].split()[0]) if " of " in text else 0
    assert counts["all"] == 60
    assert counts["differ"] == counts["one"] + counts["two"] > 0
    page.select_option("#completions-filter", "one")
    for scores in page.locator("#completions-list article").all()[:5]:
        shown = scores.locator(".score").all_inner_texts()
        assert shown[1:] == ["score 100%", "score 0%"]
    assert opened.errors == []


def test_pages_are_turned(browser, report) -> None:
    opened = Opened(browser, report)
    first = opened.page.locator("#completions-list h3").first.inner_text()
    assert opened.page.locator("#completions-back").is_disabled()
    opened.page.click("#completions-next")
    assert opened.said() == "Prompts 21 to 40 of 60"
    opened.page.click("#completions-next")
    assert opened.page.locator("#completions-next").is_disabled()
    for _ in range(2):
        opened.page.click("#completions-back")
    assert opened.page.locator("#completions-list h3").first.inner_text() == first


def test_without_scripts_the_verdict_figures_tables_and_completions_are_there(browser, report) -> None:
    opened = Opened(browser, report, java_script_enabled=False)
    page = opened.page
    assert page.locator("#headline").inner_text() == "SimPO beats DPO"
    assert page.locator("figure svg").count() >= 3
    assert page.locator("table").count() >= 5
    assert page.locator("#completions-static article").count() == 40
    assert page.locator("#completions-tools").is_hidden()


def test_5000_prompts_load_and_filter_without_a_wait(browser, tmp_path) -> None:
    """Two seconds to load and a fifth of one to filter, measured in the browser itself; ten times that passes here.

    An idle machine takes a tenth of it. What keeps it so: only a page of 20 prompts is ever laid out.
    """
    path = render_report(build_study(tmp_path / "letters", prompts=5000, seeds=(0,), bare=True)).resolve()
    opened = Opened(browser, path)
    loaded = opened.page.evaluate("performance.getEntriesByType('navigation')[0].duration")
    assert opened.said() == "Prompts 1 to 20 of 5,000"
    slowest = opened.page.evaluate(
        """() => Math.max(...["e", "abc", "question 77", "zzz", ""].map((words) => {
            const search = document.getElementById("completions-search"), start = performance.now();
            search.value = words;
            search.dispatchEvent(new Event("input"));
            document.body.offsetHeight;
            return performance.now() - start;
        }))"""
    )
    assert opened.page.locator("#completions-list article").count() == 20
    assert loaded < 20_000
    assert slowest < 2_000
    assert opened.errors == []


def test_hostile_text_runs_nothing_and_asks_for_nothing(browser, tmp_path) -> None:
    """One prompt and its answers for each of the texts."""
    study = build_study(tmp_path / "letters", prompts=len(HOSTILE), bare=True)
    for path in [*study.glob("trials/*/completions.jsonl"), study / "base" / "completions.jsonl"]:
        rows = zip(read_jsonl(path), itertools.cycle(HOSTILE.values()))
        write_jsonl(path, [row | {"prompt": text, "completion": text} for row, text in rows])
    path = render_report(study).resolve()
    opened = Opened(browser, path)
    assert opened.errors == []
    assert opened.requests == [f"file://{path}"]
    assert opened.page.locator("#completions-list article").count() == len(HOSTILE)
    assert opened.page.locator("#completions-list :is(script, img, a, iframe, style)").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_serious_violation(scheme, browser, report) -> None:
    opened = Opened(browser, report, color_scheme=scheme)
    found = Axe().run(opened.page).response["violations"]
    serious = [v for v in found if v["impact"] in ("serious", "critical")]
    assert serious == [], [(v["id"], [n["html"][:120] for n in v["nodes"][:3]]) for v in serious]


@pytest.mark.parametrize("width", [360, 1200])
def test_nothing_is_wider_than_the_screen(width, browser, report) -> None:
    opened = Opened(browser, report, viewport={"width": width, "height": 800})
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
