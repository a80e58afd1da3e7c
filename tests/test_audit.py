"""What a smoke sweep does to its files, counted by an audit hook in its process and in every process that it launches.

One identity per trial, few writes that wait for the disk, and each file of a trial read at most twice.
"""

from __future__ import annotations

import collections
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TRIALS = 3  # of the smoke sweep: the SFT base and one trial per arm
MAX_WRITES = 60
MAX_READS = 2

# Loaded by every Python process of the sweep. Lines of several processes go to one file, each by one append.
SITECUSTOMIZE = """
import json, os, sys

log = os.open(os.environ["AUDIT_LOG"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
results = os.environ["AUDIT_RESULTS"]

def hook(event, arguments):
    if event == "open":
        path, _, flags = arguments
        if isinstance(path, int) or flags & (os.O_WRONLY | os.O_RDWR):
            return
        path = os.path.abspath(os.fsdecode(path))
        if not path.startswith(results) or not os.path.isfile(path):
            return
        value = path[len(results) + 1:]
    elif event in ("harness.trial_id", "harness.write"):
        value = str(arguments[0])
    else:
        return
    os.write(log, (json.dumps([event, value, os.getpid()]) + "\\n").encode())

sys.addaudithook(hook)
"""


@pytest.fixture(scope="module", params=["basic", "joblib"])
def launcher(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def events(launcher: str, tmp_path_factory) -> list[tuple[str, str, int]]:
    """All events of one smoke sweep: event, trial id or path, process id."""
    folder = tmp_path_factory.mktemp("audit").resolve()
    (folder / "code").mkdir()
    (folder / "code" / "sitecustomize.py").write_text(SITECUSTOMIZE)
    results = folder / "results"
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(folder / "code"), str(ROOT)]),
        "AUDIT_LOG": str(folder / "events.jsonl"),
        "AUDIT_RESULTS": str(results),
    }
    options = ["+sweep=smoke", "study=s", "tracking=none", f"hydra/launcher={launcher}", f"results_dir={results}"]
    done = subprocess.run(
        [sys.executable, "-m", "harness.sweep", *options], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert len(list((results / "s" / "trials").iterdir())) == TRIALS - 1
    return [tuple(json.loads(line)) for line in (folder / "events.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_launched_processes_are_counted(launcher: str, events) -> None:
    assert (len({process for _, _, process in events}) > 1) == (launcher != "basic")


@pytest.mark.slow
def test_the_identity_of_each_trial_is_computed_once(events) -> None:
    computed = collections.Counter(value for event, value, _ in events if event == "harness.trial_id")
    assert len(computed) == TRIALS
    assert computed.total() == TRIALS, computed


@pytest.mark.slow
def test_few_writes_wait_for_the_disk(events) -> None:
    written = collections.Counter(Path(value).name for event, value, _ in events if event == "harness.write")
    assert written["scores.csv"] >= 1, "the event `harness.write` is raised by study/files.py"
    assert written.total() <= MAX_WRITES, written.most_common()


@pytest.mark.slow
def test_a_process_reads_each_file_of_a_trial_at_most_twice(events) -> None:
    """Files that stages write: PEFT opens an adapter's own files by itself, three times for each load."""
    read = collections.Counter(
        (value, process)
        for event, value, process in events
        if event == "open" and Path(value).parts[1] in ("trials", "base") and "adapter" not in Path(value).parts
    )
    assert {(path, count) for (path, _), count in read.items() if count > MAX_READS} == set()
