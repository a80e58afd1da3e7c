"""Tracking: offline without an account, separate runs, and never a reason for a trial to fail."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from wandb.proto import wandb_internal_pb2

from harness.config.schema import TrackingConfig
from harness.study.files import read_json
from harness.track.tracker import NoTracker, Trackers, WandbTracker, track
from tests.conftest import SMALL, overriding
from tests.servers.wandb import KEY, wandb_server


def records(path: Path):
    """Read a .wandb file: LevelDB log framing, 7-byte headers (crc u32, length u16, type u8) in 32 KiB blocks."""
    content, position, buffer = path.read_bytes(), 7, b""
    while position + 7 <= len(content):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", content[position : position + 7])
        buffer += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(buffer)
            buffer = b""
            yield record


def values(items) -> dict:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def about(folder: Path, name: str = "dpo-s0") -> dict:
    return {
        "folder": folder,
        "name": name,
        "group": "study-1",
        "job_type": "dpo",
        "tags": ["dpo"],
        "config": {"seed": 0},
    }


OFFLINE = TrackingConfig(backend="wandb", mode="offline")


def runs(folder: Path) -> dict[str, list]:
    """Read all offline runs, by name; W&B's own process writes the last records a moment after `finish` returns."""
    found = {}
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        deadline = time.monotonic() + 300
        content = list(records(path))
        while not any(record.HasField("exit") for record in content) and time.monotonic() < deadline:
            time.sleep(0.1)
            content = list(records(path))
        run = next(record.run for record in content if record.HasField("run"))
        found[run.display_name] = [run, content]
    return found


@pytest.mark.slow
def test_a_run_is_written_offline_with_its_group_config_metrics_and_table(tmp_path: Path) -> None:
    with track(OFFLINE, **about(tmp_path)) as tracker:
        tracker.log({"train/loss": 0.5})
        tracker.table("completions", ["prompt", "completion"], [["q", "a"]])
        tracker.summarise({"golden/checks": 0.7})
    run, content = runs(tmp_path)["dpo-s0"]
    assert (run.run_group, run.job_type, list(run.tags)) == ("study-1", "dpo", ["dpo"])
    assert values(run.config.update)["seed"] == 0
    history = [values(record.history.item) for record in content if record.HasField("history")]
    assert history[0]["train/loss"] == 0.5
    assert history[1]["completions.nrows"] == 1
    summary = {k: v for r in content if r.HasField("summary") for k, v in values(r.summary.update).items()}
    assert summary["golden/checks"] == 0.7
    exits = [record.exit.exit_code for record in content if record.HasField("exit")]
    assert exits == [0]


@pytest.mark.slow
def test_a_run_that_raises_is_closed_as_failed_and_does_not_swallow_the_next(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="boom"), track(OFFLINE, **about(tmp_path, "first")):
        raise RuntimeError("boom")
    with track(OFFLINE, **about(tmp_path, "second")) as tracker:
        tracker.log({"x": 1})
    found = runs(tmp_path)
    assert set(found) == {"first", "second"}
    codes = {name: [r.exit.exit_code for r in content if r.HasField("exit")] for name, (_, content) in found.items()}
    assert codes == {"first": [1], "second": [0]}


def test_none_tracks_nothing(tmp_path: Path) -> None:
    with track(TrackingConfig(backend="none"), **about(tmp_path)) as tracker:
        tracker.log({"x": 1})
        tracker.table("t", ["a"], [[1]])
    assert isinstance(tracker, NoTracker)
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_wandb_is_said_once_and_goes_no_further(capsys) -> None:
    class Broken:
        def log(self, metrics: dict) -> None:
            raise ConnectionError("no server")

    tracker = WandbTracker(Broken(), Trackers())
    tracker.log({"x": 1})
    tracker.log({"x": 2})
    assert tracker.failed
    assert capsys.readouterr().err.count("no server") == 1


@pytest.mark.slow
def test_online_without_an_account_falls_back_to_offline(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("HOME", str(tmp_path))
    with track(TrackingConfig(backend="wandb", mode="online"), **about(tmp_path)) as tracker:
        tracker.log({"x": 1})
    assert "dpo-s0" in runs(tmp_path)


@pytest.mark.slow
def test_a_server_that_never_answers_costs_one_wait_and_the_runs_are_offline(
    tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr("harness.track.tracker.INIT_TIMEOUT_SECONDS", 2)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("HOME", str(tmp_path))
    seconds, trackers = [], Trackers()
    online = TrackingConfig(backend="wandb", mode="online")
    with wandb_server(hangs_from=1) as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        for name in ("first", "second"):
            began = time.monotonic()
            with track(online, **about(tmp_path, name), trackers=trackers) as tracker:
                tracker.log({"train/loss": 0.5})
                tracker.table("completions", ["prompt"], [["q"]])
            seconds.append(time.monotonic() - began)
        found = runs(tmp_path)
    assert set(found) == {"first", "second"}
    for _, content in found.values():
        assert [record.exit.exit_code for record in content if record.HasField("exit")] == [0]
    assert seconds[0] >= 2, "the first run waited for the server"
    assert trackers.modes("online") == ["offline"], "the second did not"
    assert Trackers().modes("online") == ["online", "offline"], "another driver's runs are not concerned"
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1, said
    assert "offline" in said[0]


# A trial and its SFT base in one process, as a user starts them, with shorter waits and the time at which it was done.
TRIAL = """
import sys, time
from harness.track import tracker
from harness.sweep.app import run_single

tracker.INIT_TIMEOUT_SECONDS, tracker.WAIT_SECONDS = 3, 3
status = run_single(sys.argv[2:])
open(sys.argv[1], "w").write(str(time.time()))
sys.exit(status)
"""


def online_trial(tmp_path: Path, url: str) -> tuple[subprocess.CompletedProcess, int, float]:
    """Run a trial that is tracked online; return how it ended, its process id and the seconds from done to ended."""
    done = tmp_path / "done.txt"
    settings = ["tracking=wandb", "tracking.mode=online", f"results_dir={tmp_path / 'results'}", "+method=dpo"]
    overrides = overriding(SMALL, *settings)
    mine = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    mine |= {"HOME": str(tmp_path), "WANDB_BASE_URL": url, "WANDB_API_KEY": KEY}
    command = [sys.executable, "-c", TRIAL, str(done), *overrides]
    with subprocess.Popen(command, env=mine, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            out, err = process.communicate(timeout=1200)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    ended = time.time() - float(done.read_text())
    return subprocess.CompletedProcess(command, process.returncode, out, err), process.pid, ended


@pytest.mark.slow
def test_a_server_that_hangs_later_delays_a_trial_a_little_and_its_run_can_be_uploaded_later(tmp_path: Path) -> None:
    with wandb_server(hangs_from=2) as server:
        ended, process, seconds = online_trial(tmp_path, server.url)
    assert ended.returncode == 0, ended.stderr
    assert seconds < 60, "it waits for a server that hangs until it answers, which it never does"
    left = [found for found in psutil.process_iter(["cmdline"]) if str(process) in (found.info["cmdline"] or ())]
    assert left == []
    (study,) = (tmp_path / "results").glob("*/study.yaml")
    manifests = [read_json(study.parent / "base" / "manifest.json")]
    manifests += [read_json(path) for path in study.parent.glob("trials/*/manifest.json")]
    assert [facts["status"] for facts in manifests] == ["complete", "complete"]
    assert list(runs(study.parent)) == [next(f"dpo-{m['config']}-s0" for m in manifests if m["arm"] == "dpo")]
    (online,) = study.parent.glob("wandb/run-*")
    content = list(records(next(online.glob("*.wandb"))))
    assert {"run", "history", "summary"} <= {record.WhichOneof("record_type") for record in content}
    (said,) = [line for line in ended.stderr.splitlines() if "wandb sync" in line]
    assert f"wandb sync --no-skip-online {online}" in said
    assert KEY not in ended.stdout + ended.stderr
    with wandb_server() as server:
        mine = os.environ | {"HOME": str(tmp_path), "WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY}
        command = [sys.executable, "-m", "wandb", "sync", "--yes", "--no-skip-online", str(online)]
        subprocess.run(command, env=mine, cwd=tmp_path, check=True, capture_output=True, timeout=1200)
    assert any("golden/" in text for path, text in server.files.items() if path.endswith("file_stream"))
