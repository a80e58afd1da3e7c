"""Log-probs of given answers: packed and padded alike; and the reference cache, which computes an answer once per base."""

from __future__ import annotations

import hashlib
import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import MistralConfig, MistralForCausalLM

import harness.train.logps
from harness.data.tokens import TokenisedPairs, TokenPair
from harness.sweep.problems import load_run
from harness.train.logps import (
    CHECKED_ROWS,
    StaleReferenceError,
    forget_probe,
    padded_logps,
    pair_logps,
    reference_logps,
    why_padded,
)
from harness.train.packed import answer_sums, groups_of, pack
from tests.conftest import load_base, tiny_model, tokens_of

CONFIG = load_run(["+method=dpo", "data.max_train_pairs=24"])
ROW = TokenPair("a", "p", (1, 2, 3), (5, 6, 2), (8, 2))


@pytest.fixture(scope="module")
def base():
    return load_base(CONFIG)


def rows() -> tuple[TokenPair, ...]:
    return tokens_of(CONFIG).train.rows[:12]


def test_each_token_is_computed_once_and_the_head_sees_answers_only(base) -> None:
    """Counted at the model itself: its input's tokens, and the rows that its head multiplies."""
    forget_probe(base)
    pairs = rows()
    computed: list[int] = []
    counter = base.model.register_forward_hook(
        lambda module, args, kwargs, output: computed.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    unique = sum(len(row.prompt_ids) + len(row.chosen_ids) + len(row.rejected_ids) for row in pairs)
    prompts = sum(len(row.prompt_ids) for row in pairs)
    pair_logps(base, pairs, pad_id=0, desc="")
    assert sum(computed) > unique, "the probe of whether it can be packed, once for a model"
    computed.clear()
    shared = pair_logps(base, pairs, pad_id=0, desc="")
    assert sum(computed) == unique - 2 * len(pairs)  # an answer's last token predicts nothing
    computed.clear()
    apart = pair_logps(base, pairs, pad_id=0, desc="", share_prefix=False)
    assert sum(computed) == unique + prompts - 2 * len(pairs)
    counter.remove()
    assert torch.allclose(shared, apart, atol=1e-4)
    packed = pack(groups_of(pairs, share_prefix=True))
    assert len(packed.predicting) == len(packed.targets) == sum(len(r.chosen_ids) + len(r.rejected_ids) for r in pairs)


def test_packed_and_padded_log_probs_agree(base) -> None:
    padded = padded_logps(base, rows(), pad_id=0)
    assert torch.allclose(pair_logps(base, rows(), pad_id=0, desc=""), padded, atol=1e-4)


def test_a_sliding_window_runs_packed_whether_it_is_reached_or_not() -> None:
    """Mistral's, which it hands to its attention."""
    row = TokenPair("a", "p", tuple(range(1, 13)), (5, 6, 7, 2), (8, 2))
    expected = {}
    for window in (64, 8):
        model = tiny_model(MistralConfig, MistralForCausalLM, sliding_window=window)
        padded = padded_logps(model, [row], pad_id=0)
        assert why_padded(model, [row], 0) == ""
        assert torch.allclose(pair_logps(model, [row], pad_id=0, desc=""), padded, atol=1e-4)
        expected[window] = padded
    assert not torch.allclose(expected[64], expected[8], atol=1e-3)  # the window matters here


def test_a_model_whose_packed_log_probs_differ_falls_back_to_padding(monkeypatch) -> None:
    monkeypatch.setattr(
        harness.train.logps, "answer_sums", lambda logps, packed: answer_sums(logps, packed) + torch.tensor([0.0, 0.1])
    )
    model = tiny_model()
    assert why_padded(model, [ROW], 0) == "its log-probs differ by 0.05 nats per token from the padded ones"
    assert pair_logps(model, [ROW], pad_id=0, desc="").tolist() == padded_logps(model, [ROW], pad_id=0).tolist()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_memory_that_runs_out_in_the_probe_does_not_say_that_a_model_cannot_be_packed(error, monkeypatch) -> None:
    def run_out(*args, **kwargs):
        raise error("none left")

    model = tiny_model()
    with monkeypatch.context() as patch:
        patch.setattr(harness.train.logps, "packed_logps", run_out)
        with pytest.raises(error):
            why_padded(model, [ROW], 0)
    assert why_padded(model, [ROW], 0) == ""


@pytest.fixture
def computed(monkeypatch) -> list[int]:
    """Number of pairs in each call that computes log-probs."""
    real, sizes = harness.train.logps.pair_logps, []

    def counted(model, rows, **more):
        sizes.append(len(rows))
        return real(model, rows, **more)

    monkeypatch.setattr(harness.train.logps, "pair_logps", counted)
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
    keys, sums = (load_file(path)[name] for name in ("keys", "sums"))
    sums = sums + 0.01
    seal = hashlib.sha256(keys.tobytes() + sums.tobytes()).hexdigest()
    save_file({"keys": keys, "sums": sums}, path, metadata={"sha256": seal})
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
    fork = multiprocessing.get_context("fork")
    parts = [pairs().rows[start : start + 14] for start in (0, 10)]
    running = [fork.Process(target=cached, args=(base, tmp_path, part)) for part in parts]
    for process in running:
        process.start()
    for process in running:
        process.join()
    assert [process.exitcode for process in running] == [0, 0]
    assert not list(tmp_path.glob("*/.*"))
    alone = cached(base, tmp_path / "alone")
    assert torch.allclose(cached(base, tmp_path), alone, atol=1e-4)
