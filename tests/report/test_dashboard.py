"""The dashboard: all studies in whatever state, in the terminal's order of events and in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.dashboard import main
from harness.report.dashboard import make_server, read_overviews, render_dashboard
from harness.report.page import render_report
from harness.study.files import read_json, write_json, write_text
from harness.study.outcome import end_log, note_step, running_curves
from tests.report.test_page import HOSTILE, Page
from tests.report.test_pages import CHROMIUM, Opened, browser
from tests.study_fixture import build_study

__all__ = ["browser"]  # a fixture
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: pages are not opened")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three decided studies, one that failed in part, one that is half done, one that is broken."""
    root = tmp_path_factory.mktemp("made") / "results"
    for number, name in enumerate(("first", "second", "third")):
        folder = build_study(root / name, prompts=20 + number, bare=True)
        render_report(folder) if name == "first" else write_text(folder / "report.html", "a report")
    failed = build_study(root / "failed", prompts=5, bare=True)
    (failed / "verdict.json").unlink()
    trial = next((failed / "trials").iterdir())
    write_json(trial / "failure.json", {"arm": "dpo", "error": "MemoryError", "message": "x", "stage": "train"})
    half = build_study(root / "half", prompts=5, bare=True)
    (half / "verdict.json").unlink()
    for trial in sorted((half / "trials").iterdir())[:4]:
        write_json(trial / "manifest.json", read_json(trial / "manifest.json") | {"status": "running"})
    write_text(root / "broken" / "study.yaml", "{arms: [")
    (root / "no study").mkdir()
    return root


@pytest.fixture
def results(made: Path, tmp_path: Path) -> Path:
    """A copy of them, written now: by the time of a study's files a dashboard tells whether it is running."""
    return Path(shutil.copytree(made, tmp_path / "results", copy_function=shutil.copy))


def overview(results: Path, name: str, *, now: float | None = None):
    return next(row for row in read_overviews(results, now=now or time.time()) if row.name == name)


def test_files_from_the_future_are_not_those_of_a_study_that_runs(results: Path, tmp_path: Path) -> None:
    """A clock that was set back leaves them."""
    assert overview(results, "half").state == "running"
    assert overview(results, "half", now=time.time() - 86400).state == "no verdict"
    trial = next((results / "half" / "trials").iterdir())
    note_step(trial, 1, 2, 0.5)
    assert len(running_curves(results, now=time.time())) == 1
    assert running_curves(results, now=time.time() - 86400) == []


def test_every_study_has_a_row_whatever_its_state(results: Path) -> None:
    later = time.time() + 3600
    states = {row.name: row.state for row in read_overviews(results, now=later)}
    assert states == {
        "first": "decided",
        "second": "decided",
        "third": "decided",
        "failed": "failed trials",
        "half": "no verdict",
        "broken": "unreadable",
    }
    assert overview(results, "half").state == "running"
    assert overview(results, "half").done == 2
    assert overview(results, "half").planned == 6
    assert overview(results, "half").left == pytest.approx(4 * overview(results, "half").seconds / 2)
    assert overview(results, "failed").failed == 1
    assert "study.yaml cannot be read" in overview(results, "broken").problems[0]


def test_the_page_links_the_reports_and_needs_no_network(results: Path) -> None:
    page = Page(render_dashboard(results).read_text(encoding="utf-8"))
    links = [attrs["href"] for tag, attrs in page.elements if tag == "a"]
    assert sorted(links) == [f"{name}/report.html" for name in ("first", "second", "third")]
    assert not {tag for tag, _ in page.elements} & {"link", "img", "iframe", "object", "form"}
    assert page.open == []
    policy = next(a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert "connect-src" not in policy
    assert re.search(r"script-src 'sha256-[^']+';", policy)
    assert "SimPO against DPO over studies" in page.source


def test_two_renderings_are_the_same_bytes(results: Path) -> None:
    assert render_dashboard(results).read_bytes() == render_dashboard(results).read_bytes()


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_names_and_questions_do_nothing(text: str, results: Path) -> None:
    study = results / "first"
    write_text(study / "study.yaml", json.dumps({"question": text, "model": {"path": text}, "arms": [text, text]}))
    write_json(study / "verdict.json", read_json(study / "verdict.json") | {"metric": text, "level": text})
    page = Page(render_dashboard(results).read_text(encoding="utf-8"))
    assert page.open == []
    assert [tag for tag, _ in page.elements].count("script") == 2
    assert "img" not in {tag for tag, _ in page.elements}


def test_an_empty_folder_and_no_folder(tmp_path: Path, capsys) -> None:
    assert main([str(tmp_path)]) == 0
    assert "No study is in this folder yet." in (tmp_path / "dashboard.html").read_text()
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_a_running_trial_says_its_losses_until_its_training_ends(results: Path) -> None:
    trial = sorted((results / "half" / "trials").iterdir())[0]
    for step in (1, 2, 3):
        note_step(trial, step, 10, 0.7 - step / 10)
    (curve,) = running_curves(results, now=time.time())
    assert (curve["study"], curve["steps"], curve["total"]) == ("half", [1, 2, 3], 10)
    assert curve["losses"] == pytest.approx([0.6, 0.5, 0.4])
    assert running_curves(results, now=time.time() + 600) == []  # it was killed: nothing was added for long
    end_log(trial)
    assert running_curves(results, now=time.time()) == []


@pytest.fixture
def served(results: Path) -> Iterator[str]:
    server = make_server(results, 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def get(url: str, **headers: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=300) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, ""


def test_the_server_shows_pages_and_reports_and_nothing_else(served: str, results: Path) -> None:
    (results / ".cache").mkdir()
    write_text(results / ".cache" / "secret.json", "{}")
    write_text(results / "first" / "weights.bin", "x")
    assert get(f"{served}/")[0] == 200
    assert "All studies" in get(f"{served}/")[1]
    assert get(f"{served}/first/report.html")[0] == 200
    for path in (".cache/secret.json", "first/weights.bin", "first/", "../etc/passwd", "%2e%2e/%2e%2e/etc/hosts.html"):
        assert get(f"{served}/{path}")[0] in (400, 404), path
    assert get(f"{served}/", Host="evil.example")[0] == 403


@needs_browser
def test_sorting_filtering_and_comparing_in_a_browser(browser, results: Path) -> None:
    opened = Opened(browser, render_dashboard(results).resolve())
    page = opened.page
    assert opened.errors == []
    assert len(opened.requests) == 1
    page.fill("#search", "second")
    assert page.inner_text("#count") == "1 of 6 studies"
    page.fill("#search", "")
    page.select_option("#state", "decided")
    assert page.inner_text("#count") == "3 of 6 studies"
    page.select_option("#state", "")
    page.click("#table thead th:nth-child(4) button")
    shown = page.locator("#table tbody td:nth-child(4)").all_inner_texts()
    numbers = [float(text.split()[0].replace("−", "-")) for text in shown if text != "–"]
    assert numbers == sorted(numbers)
    assert shown[-3:] == ["–"] * 3
    assert page.locator("#table thead th:nth-child(4)").get_attribute("aria-sort") == "ascending"
    page.select_option("#first", label="first")
    page.select_option("#second", label="second")
    assert page.locator("#comparison thead").inner_text().split() == ["first", "second"]
    assert page.locator("#comparison .flag").count() >= 1
    assert opened.errors == []


@needs_browser
def test_without_scripts_the_table_and_the_plot_are_there(browser, results: Path) -> None:
    opened = Opened(browser, render_dashboard(results).resolve(), java_script_enabled=False)
    assert opened.page.locator("#table tbody tr").count() == 6
    assert opened.page.locator("#figure-forest svg").is_visible()
    assert opened.page.locator("#tools").is_hidden()


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_serious_violation(scheme: str, browser, results: Path) -> None:
    from axe_playwright_python.sync_playwright import Axe

    opened = Opened(browser, render_dashboard(results).resolve(), color_scheme=scheme)
    found = Axe().run(opened.page).response["violations"]
    serious = [v for v in found if v["impact"] in ("serious", "critical")]
    assert serious == [], [(v["id"], [n["html"][:120] for n in v["nodes"][:3]]) for v in serious]


@needs_browser
@pytest.mark.parametrize("width", [360, 1200])
def test_nothing_is_wider_than_the_screen(width: int, browser, results: Path) -> None:
    opened = Opened(browser, render_dashboard(results).resolve(), viewport={"width": width, "height": 800})
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width


@needs_browser
def test_a_live_page_shows_progress_and_loss_curves(browser, served: str, results: Path) -> None:
    trial = sorted((results / "half" / "trials").iterdir())[0]
    note_step(trial, 1, 10, 0.7)
    context = browser.new_context()
    page = context.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(f"{served}/")
    page.locator("#curves p").first.wait_for(timeout=300_000)
    assert "half, simpo: step 1 of 10, loss 0.7000" in page.inner_text(
        "#curves"
    ) or "half, dpo: step 1" in page.inner_text("#curves")
    assert "2 of 6" in page.locator("tr[data-name=half]").inner_text()
    write_json(trial / "manifest.json", read_json(trial / "manifest.json") | {"status": "complete"})
    page.locator("tr[data-name=half]", has_text="3 of 6").wait_for(timeout=300_000)
    assert errors == []
    context.close()
