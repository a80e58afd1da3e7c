"""The reference cache: an answer is computed once for a base, whatever is tuned and whoever asks."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file, save_file

import harness.train.reference
from harness.data.inputs import tokens_of
from harness.data.tokens import TokenisedPairs, TokenPair
from harness.sweep.problems import load_run
from harness.train.base import load_base
from harness.train.reference import CHECKED_ROWS, StaleReferenceError, reference_logps

CONFIG = load_run(["+method=dpo", "data.max_train_pairs=24"])


@pytest.fixture(scope="module")
def base():
    return load_base(CONFIG)


@pytest.fixture
def computed(monkeypatch) -> list[int]:
    """Number of pairs in each call that computes log-probs."""
    real, sizes = harness.train.reference.pair_logps, []

    def counted(model, rows, **more):
        sizes.append(len(rows))
        return real(model, rows, **more)

    monkeypatch.setattr(harness.train.reference, "pair_logps", counted)
    return sizes


def pairs() -> TokenisedPairs:
    return tokens_of(CONFIG).train


def cached(base, cache: Path, rows: tuple[TokenPair, ...] | None = None, sha256: str = "base") -> torch.Tensor:
    found = pairs() if rows is None else TokenisedPairs(rows, {})
    return reference_logps(found, base, base_sha256=sha256, pad_id=0, cache=cache)


def test_a_second_trial_computes_only_the_rows_that_it_checks(base, computed, tmp_path: Path) -> None:
    """Nothing of a trial is in the key: neither beta nor learning rate nor seed nor adapter is even passed."""
    first = cached(base, tmp_path)
    assert torch.equal(cached(base, tmp_path), first)
    assert computed == [24, CHECKED_ROWS]


def test_an_answer_is_found_again_in_another_order_with_another_label_and_among_others(
    base, computed, tmp_path: Path
) -> None:
    """Label noise, another subset or another split of one file need nothing new."""
    first = cached(base, tmp_path, pairs().rows[:16])
    flipped = tuple(
        replace(row, chosen_ids=row.rejected_ids, rejected_ids=row.chosen_ids) for row in reversed(pairs().rows[:16])
    )
    assert torch.equal(cached(base, tmp_path, flipped), first.flip(0, 1))
    cached(base, tmp_path)
    assert computed == [16, CHECKED_ROWS, CHECKED_ROWS, 8]


def test_another_base_or_dtype_has_a_cache_of_its_own(base, computed, tmp_path: Path) -> None:
    cached(base, tmp_path)
    cached(base, tmp_path, sha256="other weights")
    cached(load_base(CONFIG).to(torch.bfloat16), tmp_path)
    assert computed == [24, 24, 24]


def test_a_stale_reference_is_an_error(base, tmp_path: Path) -> None:
    cached(base, tmp_path)
    path = next(tmp_path.glob("*/*.safetensors"))
    part = load_file(path)
    save_file(part | {"sums": part["sums"] + 0.01}, path)
    with pytest.raises(StaleReferenceError, match=r"not the base's; delete the folder and run again"):
        cached(base, tmp_path)


def test_a_file_that_was_cut_off_is_computed_again(base, computed, tmp_path: Path) -> None:
    first = cached(base, tmp_path)
    path = next(tmp_path.glob("*/*.safetensors"))
    path.write_bytes(path.read_bytes()[:-100])
    assert torch.equal(cached(base, tmp_path), first)
    assert torch.equal(cached(base, tmp_path), first)
    assert computed == [24, 24, CHECKED_ROWS]


def test_a_file_that_was_changed_at_equal_size_is_computed_again(base, computed, tmp_path: Path) -> None:
    """One value out of 48: the rows that are checked would miss it more often than not."""
    first = cached(base, tmp_path)
    path = next(tmp_path.glob("*/*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))
    assert torch.equal(cached(base, tmp_path), first)
    assert computed == [24, 24]


def test_processes_that_write_at_once_lose_nothing(base, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from tests.train.test_reference import CONFIG, cached, load_base, pairs\n"
        "start = int(sys.argv[2])\ncached(load_base(CONFIG), Path(sys.argv[1]), pairs().rows[start:start + 14])\n"
    )
    running = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), start]) for start in ("0", "10")]
    assert [process.wait(120) for process in running] == [0, 0]
    assert not list(tmp_path.glob("*/.*"))
    alone = cached(base, tmp_path / "alone")
    assert torch.allclose(cached(base, tmp_path), alone, atol=1e-4)
