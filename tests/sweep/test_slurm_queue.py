"""How jobs are is asked of Slurm's queue where the cluster keeps no accounts, and of these where it does."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from submitit.slurm.slurm import SlurmJob

from harness.sweep.slurm_queue import watch_queue


def write_command(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def commands(tmp_path: Path, monkeypatch) -> Path:
    """A folder of commands that come before Slurm's own, where there are any."""
    monkeypatch.setattr(SlurmJob, "watcher", SlurmJob.watcher)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path


def test_without_accounts_a_job_has_ended_when_it_is_no_more_in_the_queue(commands: Path) -> None:
    write_command(commands, "sacct", "echo Slurm accounting storage is disabled >&2; exit 1")
    write_command(commands, "squeue", "echo 7_0; echo 8")
    watch_queue()
    ended = {job: SlurmJob.watcher.is_done(job, mode="force") for job in ("7_0", "7_1", "8", "9")}
    assert ended == {"7_0": False, "7_1": True, "8": False, "9": True}


def test_a_queue_that_does_not_answer_ends_no_job(commands: Path) -> None:
    write_command(commands, "sacct", "exit 1")
    write_command(commands, "squeue", "echo Unable to contact slurm controller >&2; exit 1")
    watch_queue()
    assert not SlurmJob.watcher.is_done("7_1", mode="force")


def test_with_accounts_submitit_asks_them_as_ever(commands: Path) -> None:
    before = SlurmJob.watcher
    write_command(commands, "sacct", "exit 0")
    watch_queue()
    assert SlurmJob.watcher is before
