"""The log of a trial: libraries speak into log.txt, the terminal keeps quiet, and nothing they do can stop a trial."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest

from harness.study import log as triallog
from harness.study.log import say, saying_while, trial_log
from harness.sweep.app import run_single


@pytest.mark.parametrize("disabled", [False, True], ids=["as_they_are", "disabled_by_hydra"])
def test_what_libraries_say_is_in_the_log_and_not_on_the_terminal(tmp_path: Path, capsys, disabled: bool) -> None:
    library = logging.getLogger("transformers.trainer")
    library.disabled = disabled
    logging.captureWarnings(disabled)
    with trial_log(tmp_path, "trial abc"):
        print("printed by a library")
        print("a progress bar", file=sys.stderr)
        warnings.warn("deprecated since 1.0", stacklevel=1)
        library.info("Num examples = 640")
        logging.getLogger("another.library").warning("beware")
    log = (tmp_path / "log.txt").read_text()
    for said in ("trial abc", "printed by", "a progress bar", "deprecated since 1.0", "Num examples = 640", "beware"):
        assert said in log
    assert capsys.readouterr() == ("", "")
    logging.captureWarnings(False)


def test_a_library_that_is_first_imported_by_a_trial_speaks_into_its_log_too(tmp_path: Path) -> None:
    code = (
        "import sys, logging, pathlib\n"
        "from harness.study.log import prepare_process, trial_log\n"
        "from harness.train.base import import_logging_libraries\n"
        "prepare_process()\n"
        "assert 'transformers' not in sys.modules\n"
        "import_logging_libraries()\n"
        f"with trial_log(pathlib.Path({str(tmp_path)!r}), 'trial abc'):\n"
        "    import transformers.utils.logging\n"
        "    transformers.utils.logging.get_logger('transformers.trainer').warning('beware')\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (tmp_path / "log.txt").read_text().count("beware") == 1
    assert (ran.stdout, ran.stderr) == ("", "")


def test_afterwards_everything_speaks_to_the_terminal_again(tmp_path: Path, capsys) -> None:
    before = [(logging.getLogger(name).handlers, logging.getLogger(name).level) for name in ("", "transformers")]
    streams = sys.stdout, sys.stderr
    kept = []

    def run() -> None:
        with trial_log(tmp_path, "trial abc"):
            kept.append(sys.stderr)
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        run()
    assert (sys.stdout, sys.stderr) == streams
    after = [(logging.getLogger(name).handlers, logging.getLogger(name).level) for name in ("", "transformers")]
    assert after == before
    kept[0].write("said later by a library that kept the stream")
    assert "said later" in capsys.readouterr().err


def test_a_second_run_adds_to_the_log(tmp_path: Path) -> None:
    for name in ("first", "second"):
        with trial_log(tmp_path, name):
            pass
    assert [line.split()[-1] for line in (tmp_path / "log.txt").read_text().splitlines()] == ["first", "second"]


def test_a_log_that_grows_too_long_ends_and_says_so(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(triallog, "MAX_BYTES", 2000)
    with trial_log(tmp_path, "trial abc"):
        for _ in range(1000):
            print("the same warning again and again")
    log = (tmp_path / "log.txt").read_text()
    assert len(log) < 2200
    assert log.count("the log ends here") == 1


def test_our_own_messages_reach_terminal_and_log(tmp_path: Path, capsys) -> None:
    with trial_log(tmp_path, "trial abc"):
        say("W&B could not be reached")
    assert "W&B could not be reached" in capsys.readouterr().err
    assert "W&B could not be reached" in (tmp_path / "log.txt").read_text()


@pytest.mark.slow
def test_a_real_trial_leaves_one_line_on_the_terminal_and_its_stages_in_the_log(small: list[str], capfd) -> None:
    assert run_single([*small, "+method=dpo", "seed=1"]) == 0
    out, err = capfd.readouterr()
    assert len(out.strip().splitlines()) == 1
    assert err == ""
    results = Path(next(item for item in small if item.startswith("results_dir=")).partition("=")[2])
    log = next(results.glob("*/trials/*/log.txt")).read_text()
    for stage in ("load", "reference", "train", "generate", "score"):
        assert f"harness.trial: {stage}" in log
    assert "transformers.trainer: ***** Running training *****" in log


def test_a_long_print_is_cut_where_the_log_has_no_more_room_and_not_left_out(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(triallog, "MAX_BYTES", 1000)
    with trial_log(tmp_path, "trial abc"):
        print("reason " * 1000)
    text = (tmp_path / "log.txt").read_text()
    assert text.count("reason") > 50
    assert text.endswith("(the log ends here: it has reached its limit)\n")


def test_what_takes_long_is_said_at_once_and_again_until_it_ends(capfd: pytest.CaptureFixture[str]) -> None:
    with saying_while("mine.py: scoring 7 runs", every=0.02):
        time.sleep(1)  # and no look meanwhile, which could lose half of a line
    first, *again = capfd.readouterr().err.splitlines()
    assert first == "mine.py: scoring 7 runs"
    assert set(again) == {"mine.py: scoring 7 runs: still running after 0 min; Ctrl-C ends it"}
    time.sleep(0.1)
    assert capfd.readouterr().err == ""


def test_what_fails_is_not_said_any_longer(capfd: pytest.CaptureFixture[str]) -> None:
    threads = threading.active_count()
    with pytest.raises(ZeroDivisionError), saying_while("mine.py: scoring 7 runs"):
        _ = 1 / 0
    assert threading.active_count() == threads
    assert capfd.readouterr().err == "mine.py: scoring 7 runs\n"
