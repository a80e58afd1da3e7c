"""The benchmark: what it counts is right, and it runs both sides on the same pairs. No test asserts seconds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from trl import DPOConfig

from harness.bench import stock
from harness.bench.__main__ import main
from harness.bench.page import Result, page
from harness.bench.runs import Run, steady_seconds
from harness.train.memory import matmul_rate


def test_the_rate_is_a_number_of_operations_per_second() -> None:
    assert 1e8 < matmul_rate(64, 96, seconds=0.05) < 1e15


@pytest.mark.slow
def test_both_sides_run_on_the_same_pairs_in_the_same_order(tmp_path: Path, capsys) -> None:
    """The embedded template writes nothing behind the end of a turn, so that TRL makes the same ids: equal losses."""
    assert main(["--num-pairs", "8", "--repeats", "1", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "cost.json").read_text())
    runs = {(run["side"], run["name"]): run for run in result["runs"]}
    assert set(runs) == {
        ("stock", "dpo"),
        ("stock", "dpo, precomputed"),
        ("stock", "simpo"),
        ("harness", "dpo"),
        ("harness", "simpo"),
    }
    for run in runs.values():
        assert len(run["losses"]) == 2
        assert run["wall"] >= run["seconds"]["train"] > 0
        assert run["peak_memory_bytes"] > 50_000_000
    for arm in ("dpo", "simpo"):
        assert runs["harness", arm]["losses"] == pytest.approx(runs["stock", arm]["losses"], rel=1e-3)
    text = (tmp_path / "cost.md").read_text()
    assert text.strip() == capsys.readouterr().out.strip()
    assert "| dpo against dpo |" in text
    assert page(result) == text


def run_of(side: str, name: str, *, wall: float, pair: float, reference: float = 0.0, memory: int = 10**9) -> Run:
    seconds = {"import": 2.0, "train": 8 * pair} | ({"reference": reference} if reference else {})
    return {
        "side": side,
        "name": name,
        "wall": wall,
        "seconds": seconds,
        "pair_seconds": pair,
        "peak_memory_bytes": memory,
        "losses": [0.69, 0.68],
    }


def result_of(device: str, *runs: Run) -> Result:
    versions = dict.fromkeys(("python", "torch", "trl", "transformers", "peft"), "1")
    return {
        "model": "m",
        "num_pairs": 8,
        "tokens": 800,
        "padded_tokens": 1600,
        "matmul_flops_per_second": [1e12] * len(runs),
        "needed_flops": 8e11,
        "needed_reference_flops": 4e11,
        "steady_pair_flops": 1e11,
        "runs": list(runs),
        "versions": versions,
        "commit": None,
        "hardware": {"cpu": "c", "cores": 2, "device": device},
    }


BOTH = (
    run_of("stock", "dpo", wall=60.0, pair=1.0, memory=4 * 10**9),
    run_of("harness", "dpo", wall=15.0, pair=0.2, reference=0.8, memory=2 * 10**9),
    run_of("stock", "simpo", wall=50.0, pair=0.5, memory=4 * 10**9),
    run_of("harness", "simpo", wall=10.0, pair=0.125, memory=2 * 10**9),
)


def row(text: str, start: str, which: int = 0) -> list[str]:
    found = [line for line in text.splitlines() if line.startswith(start)][which]
    return [cell.strip() for cell in found.strip("|").split("|")]


def test_seconds_a_pair_leave_out_the_first_two_steps() -> None:
    """Training began at 10; steps of 4 pairs ended at 20, 25, 27, 29: two steps of 2 s."""
    assert steady_seconds([10, 20, 25, 27, 29]) == pytest.approx(2 / 4)
    assert steady_seconds([10, 20, 24]) == pytest.approx(4 / 4), "of two steps the second"
    assert steady_seconds([10, 20]) == pytest.approx(10 / 4), "one step is all there is"


def test_the_ratio_in_steady_state_has_the_reference_pass_in_it() -> None:
    """DPO: 0.2 s and 0.8 s over 8 pairs, of 1 s; products of 0.1 s at the rate are half of 0.2 s."""
    cells = row(page(result_of("NVIDIA X", *BOTH)), "| dpo against dpo |", which=1)
    assert cells[1:] == ["1000.0", "300.0", "0.30 (0.30 to 0.30)", "0.33", "10%", "50%", "45%"]
    cells = row(page(result_of("NVIDIA X", *BOTH)), "| simpo against simpo |", which=1)
    assert cells[3:5] == ["0.25 (0.25 to 0.25)", "0.40"]


@pytest.mark.parametrize(
    ("device", "wall", "memory", "steady"), [("cpu", "0.33", "0.65", "–"), ("X", "–", "0.7", "0.33")]
)
def test_targets_are_of_whole_runs_on_a_cpu_and_of_steady_state_on_a_gpu(device, wall, memory, steady) -> None:
    text = page(result_of(device, *BOTH))
    whole = row(text, "| dpo against dpo |")
    assert (whole[4], whole[6]) == (wall, memory)
    assert row(text, "| dpo against dpo |", which=1)[4] == steady


def test_a_grid_that_was_not_run_is_computed_and_says_so() -> None:
    """TRL's: 4 * (60 + 50). Ours: import and reference once, 2.8 s, and 4 * (15 - 2.8) + 4 * (10 - 2)."""
    text = page(result_of("cpu", *BOTH))
    assert "**Computed** from the runs above, not run" in text
    assert "takes 440 s" in text
    assert "and 84 s by the harness" in text
    grids = [run_of(side, "grid", wall=9.0, pair=1.0) for side in ("stock", "harness")]
    assert "**Computed**" not in page(result_of("cpu", *BOTH, *grids))


def test_on_a_gpu_trls_script_has_trls_own_defaults() -> None:
    """Precision, checkpointing and optimiser are TRL's, which has bf16 and checkpointing on; a CPU has them off."""
    chosen = {"bf16", "fp16", "gradient_checkpointing", "optim", "use_cpu", "tf32", "use_liger_kernel"}
    assert not chosen & set(stock.settings(is_gpu=True))
    assert stock.settings(is_gpu=False).items() >= {"bf16": False, "gradient_checkpointing": False}.items()
    by_default = DPOConfig(use_cpu=True)
    assert (by_default.bf16, by_default.gradient_checkpointing) == (True, True)


@pytest.mark.slow
def test_a_run_that_fails_ends_the_command_with_its_last_lines(tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "peft.py").write_text("raise ImportError('planted')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert main(["--num-pairs", "8", "--arms", "dpo", "--repeats", "1", "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert "stock.py dpo" in said
    assert said.rstrip().endswith("ImportError: planted")


def test_a_file_of_an_earlier_version_has_its_page() -> None:
    old = result_of("cpu", *BOTH)
    del old["steady_pair_flops"]
    for run in old["runs"]:
        del run["pair_seconds"]
    assert "| dpo against dpo |" in page(old)
    assert "steady state" not in page(old)


USAGE = [
    (["--repeats", "0"], "--repeats 0: give 1 or more; --arms none makes no such runs"),
    (["--repeats", "-3"], "--repeats -3: give 1 or more"),
    (["--arms", "dpo,kto"], "--arms: there is no arm 'kto'; there are dpo, simpo, and none"),
    (["--arms", ""], "--arms: there is no arm ''"),
    (["--arms", "none"], "--arms none: there is nothing to run; give one of --grid, --levers, --layout, --scale"),
    (["--num-pairs", "0"], "--num-pairs 0: a step has 4 pairs; give a multiple of 4, at least 8"),
    (["--num-pairs", "-8"], "--num-pairs -8: a step has 4 pairs"),
    (["--num-pairs", "10"], "--num-pairs 10: a step has 4 pairs"),
    (["--append"], "--append: there is no --out; give the folder of the cost.json that gets more runs"),
    (["--pairs", "nowhere.jsonl"], "nowhere.jsonl"),
    (["--model", "nowhere"], "--model nowhere: give its pairs as well, by --pairs FILE"),
    (["--model", "nowhere", "--pairs", "none.jsonl"], "nowhere"),
    (["--out", "/proc/nowhere"], "--out /proc/nowhere: cannot be made"),
    (["--num-pairs", "100000"], "--num-pairs 100000: embedded has 320 that can be trained on"),
]


@pytest.mark.parametrize(("arguments", "message"), USAGE, ids=[" ".join(arguments) for arguments, _ in USAGE])
def test_what_cannot_be_run_is_refused_before_anything_is_written(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments", [["--repeats", "two"], ["--repeats", "1.5"], ["--num-pairs", "x"], ["--nonsense"]]
)
def test_what_is_no_number_or_no_option_is_refused(arguments: list[str], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as refused:
        main(arguments)
    assert refused.value.code == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "contents", ["", "[]", "{}", '{"runs": []}', '{"runs": [1], "matmul_flops_per_second": [1]}', "no json"]
)
def test_a_file_that_is_no_cost_json_is_not_added_to(contents: str, tmp_path: Path, capsys) -> None:
    (tmp_path / "cost.json").write_text(contents)
    assert main(["--num-pairs", "8", "--append", "--out", str(tmp_path)]) == 2
    assert "is not a cost.json of this command; give another --out" in capsys.readouterr().err
    assert (tmp_path / "cost.json").read_text() == contents


def test_an_out_that_is_a_file_is_refused(tmp_path: Path, capsys) -> None:
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        (tmp_path / "file").write_text("x")
        assert main(["--out", str(out)]) == 2
        assert f"--out {out}: {tmp_path / 'file'} is not a folder that can be written to" in capsys.readouterr().err


def test_without_out_the_results_go_to_a_new_folder(tmp_path: Path, monkeypatch) -> None:
    from harness.bench import __main__ as command

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command.time, "strftime", lambda form: "bench-now")
    assert command.out_folder(None) == Path("results/bench-now")
    (tmp_path / "results" / "bench-now").mkdir(parents=True)
    assert command.out_folder(None) == Path("results/bench-now-2")
    assert command.out_folder(Path("mine")) == Path("mine"), "what is typed is taken"
