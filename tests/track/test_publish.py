"""Publishing a study to W&B: prepared without an account; with one, runs, workspace and report, renewed in place."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from harness.config.schema import TrackingConfig
from harness.report.page import render_report
from harness.report.study import read_study
from harness.study.outcome import STEP
from harness.track.publish import build_report, build_workspace
from harness.track.tracker import track
from tests.servers import command
from tests.servers.wandb import KEY, wandb_server
from tests.study_fixture import build_study

OFFLINE = TrackingConfig(backend="wandb", mode="offline")


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study with its report."""
    folder = build_study(tmp_path_factory.mktemp("reported") / "a-study", prompts=12)
    render_report(folder)
    return folder


@pytest.fixture
def study(reported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(reported, tmp_path / "results" / "a-study"))


def log_runs(study: Path) -> None:
    """Write two offline runs as a trial and a study do."""
    about = {"folder": study, "group": study.name, "tags": [], "config": {}}
    with track(OFFLINE, name="dpo-s0", job_type="dpo", **about) as tracker:
        tracker.log({STEP: 1, "train/loss": 0.5})
        tracker.log({STEP: 1, "golden/checks": 0.7})
    with track(OFFLINE, name="verdict", job_type="study", **about) as tracker:
        tracker.table("side_by_side", ["prompt", "dpo"], [["q", "a"]])
        tracker.page("figures/interval", study / "figures" / "interval.svg")


def publish(study: Path, home: Path, *words: str, **environment: str) -> subprocess.CompletedProcess:
    """Run the command as a user would, with nobody logged in but by these variables."""
    mine = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    mine |= {"HOME": str(home)} | environment
    return command.run("harness.report", str(study), "--publish", *words, environment=mine)


@pytest.mark.slow
def test_without_an_account_all_is_prepared_and_the_message_says_what_to_do(study: Path, tmp_path: Path) -> None:
    log_runs(study)
    done = publish(study, tmp_path)
    assert done.returncode == 1
    assert done.stdout.strip() == str(study / "report.html")
    assert "no W&B account is known here" in done.stderr
    assert "Prepared: 2 offline runs to upload, a workspace and a report" in done.stderr
    assert f"wandb sync {study}/wandb/offline-run-*" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_server_that_does_not_answer_is_said_and_nothing_is_lost(study: Path, tmp_path: Path) -> None:
    log_runs(study)
    before = {path: path.read_bytes() for path in study.glob("wandb/offline-run-*/*.wandb")}
    done = publish(study, tmp_path, WANDB_BASE_URL="http://127.0.0.1:9", WANDB_API_KEY=KEY)
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    assert "W&B did not answer or refused" in done.stderr
    assert KEY not in done.stdout + done.stderr
    # W&B's service may still be writing when the runs have ended: what was there stays.
    assert all(path.read_bytes().startswith(content) for path, content in before.items())
    assert all(before.values())


def test_a_study_that_was_not_tracked_has_nothing_to_publish(study: Path, tmp_path: Path) -> None:
    done = publish(study, tmp_path)
    assert done.returncode == 2
    assert "no W&B runs" in done.stderr


@pytest.mark.slow
def test_with_an_account_runs_are_uploaded_and_both_pages_saved_and_the_second_time_renewed(
    study: Path, tmp_path: Path
) -> None:
    log_runs(study)
    with wandb_server() as server:
        account = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY}
        first = publish(study, tmp_path, **account)
        assert first.returncode == 0, first.stderr
        assert {run["displayName"] for run in server.runs.values()} == {"dpo-s0", "verdict"}
        assert {run["groupName"] for run in server.runs.values()} == {study.name}
        uploaded = " ".join(server.files)
        assert "media/table/side_by_side" in uploaded
        assert "media/html/figures/interval" in uploaded
        assert {view["type"] for view in server.views.values()} == {"project-view", "runs"}
        sent = len(server.runs)
        again = publish(study, tmp_path, **account)
        assert again.returncode == 0, again.stderr
        assert again.stdout == first.stdout  # the same addresses
        assert (len(server.views), len(server.runs)) == (2, sent)
        assert json.loads((study / "wandb" / "published.json").read_text()) == {
            line.split(": ")[0]: line.split(": ")[1] for line in first.stdout.splitlines()[1:]
        }


@pytest.mark.slow
def test_pages_that_are_refused_are_said_after_the_runs_are_uploaded(study: Path, tmp_path: Path) -> None:
    log_runs(study)
    with wandb_server() as server:
        server.refuse_views = True
        done = publish(study, tmp_path, WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY)
    assert done.returncode == 1
    assert "the runs are uploaded, but W&B did not take the workspace" in done.stderr
    assert KEY not in done.stdout + done.stderr


@pytest.mark.slow
def test_what_a_study_says_of_where_it_goes_is_no_reason_to_send_it_there(study: Path, tmp_path: Path) -> None:
    log_runs(study)
    (study / "base" / "config.yaml").write_text("tracking: {entity: strangers}")
    with wandb_server() as server:
        account = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY}
        done = publish(study, tmp_path, **account)
        assert (done.returncode, server.runs, server.views) == (2, {}, {})
        assert "add --entity strangers or --entity team" in done.stderr
        done = publish(study, tmp_path, "--entity", "team", **account)
        assert done.returncode == 0, done.stderr
        assert {run["entity"] for run in server.runs.values()} == {"team"}


@pytest.mark.slow
def test_a_study_does_not_overwrite_another_page_of_this_users_account(study: Path, tmp_path: Path) -> None:
    log_runs(study)
    other = build_study(tmp_path / "results" / "mine", prompts=3)
    (other / "study.yaml").write_text((other / "study.yaml").read_text().replace("study: letters", "study: mine"))
    log_runs_of = other / "wandb" / "run-1"
    log_runs_of.mkdir(parents=True)
    with wandb_server() as server:
        account = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY}
        assert publish(other, tmp_path, **account).returncode == 0
        before = {key: dict(view) for key, view in server.views.items()}
        (study / "wandb" / "published.json").write_bytes((other / "wandb" / "published.json").read_bytes())
        assert publish(study, tmp_path, **account).returncode == 0
        assert {key: server.views[key] for key in before} == before
        assert len(server.views) == 4


def test_a_link_among_a_studys_runs_is_not_uploaded(study: Path, tmp_path: Path) -> None:
    files = study / "wandb" / "offline-run-1" / "files"
    files.mkdir(parents=True)
    (tmp_path / "private").write_text("mine")
    (files / "output.log").symlink_to(tmp_path / "private")
    done = publish(study, tmp_path)
    assert done.returncode == 2
    assert f"{files / 'output.log'} -> {tmp_path / 'private'}" in done.stderr


def specification(page) -> str:
    return page._to_model().model_dump_json(by_alias=True)


def test_the_workspace_groups_the_studys_runs_by_arm_and_shows_the_same_figures(study: Path) -> None:
    read = read_study(study)
    page = specification(build_workspace(read, "team", "a-project"))
    content = json.loads(page)
    assert content["project"] == "a-project"
    for expected in ('"group"', '"jobType"', read.name, "golden/checks", "eval/checks", "train/loss", "side_by_side"):
        assert expected.replace('"', '\\"') in page or expected in page, expected
    for figure in (study / "figures").glob("*.svg"):
        assert f"figures/{figure.stem}" in page


def test_the_report_says_the_verdict_and_never_draws_the_losses_of_two_arms_together(study: Path) -> None:
    import wandb_workspaces.reports.v2 as wr

    read = read_study(study)
    report = build_report(read, "", "a-project")
    page = specification(report)
    assert read.verdict["reason"].split("(")[0].strip() in page
    grids = [block for block in report.blocks if isinstance(block, wr.PanelGrid)]
    with_losses = [grid for grid in grids if any("train/loss" in getattr(p, "y", []) for p in grid.panels)]
    assert len(with_losses) == 2
    for grid in with_losses:
        assert len(grid.runsets) == 1


def test_hostile_names_and_texts_are_text_in_the_report(study: Path) -> None:
    path = study / "study.yaml"
    path.write_text(path.read_text() + '\nquestion: "<script>alert(1)</script>\\e[31m [x](javascript:alert(1))"\n')
    report = build_report(read_study(study), "", "a-project")
    assert "\x1b" not in specification(report)
