"""The batch plan and the proof that a trainer kept to it."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.data.plan import (
    BatchPlan,
    ConsumedTokens,
    expected_tokens_sha256,
    make_plan,
    padding_share,
    trained_tokens,
)
from harness.data.tokens import TokenPair

ROWS = [TokenPair(str(i), "p", (1, i), (2, i), (3, i)) for i in range(5)]


@given(rows=st.integers(1, 40), epochs=st.integers(1, 3), batch=st.integers(1, 9), seed=st.integers(0, 9))
def test_every_row_is_seen_once_an_epoch(rows: int, epochs: int, batch: int, seed: int) -> None:
    plan = make_plan(rows, epochs=epochs, batch_size=batch, micro_batch_size=1, seed=seed)
    for epoch in range(epochs):
        assert Counter(plan.order[epoch * rows : (epoch + 1) * rows]) == Counter(range(rows))
    assert plan.num_steps == -(-rows * epochs // batch)


def test_the_plan_depends_on_its_seed_and_on_no_other() -> None:
    np.random.seed(1)
    first = make_plan(20, epochs=2, batch_size=4, micro_batch_size=4, seed=0)
    np.random.seed(2)
    assert first == make_plan(20, epochs=2, batch_size=4, micro_batch_size=4, seed=0)
    assert first.order != make_plan(20, epochs=2, batch_size=4, micro_batch_size=4, seed=1).order
    assert first.order[:20] != first.order[20:]


def test_batch_sizes_are_part_of_the_plans_identity() -> None:
    assert (
        make_plan(8, epochs=1, batch_size=4, micro_batch_size=2, seed=0).sha256
        != make_plan(8, epochs=1, batch_size=4, micro_batch_size=4, seed=0).sha256
    )


def test_consuming_the_plan_gives_the_expected_hash() -> None:
    consumed = ConsumedTokens()
    for index in (2, 0, 4):
        consumed.update(ROWS[index].prompt_ids, ROWS[index].chosen_ids, ROWS[index].rejected_ids)
    assert consumed.state == expected_tokens_sha256(ROWS, (2, 0, 4))
    assert consumed.num_pairs == 3


def test_another_order_an_exchange_or_a_moved_boundary_gives_another_hash() -> None:
    expected = expected_tokens_sha256(ROWS, (0, 1))
    assert expected_tokens_sha256(ROWS, (1, 0)) != expected
    swapped = ConsumedTokens()
    swapped.update((1, 0), (3, 0), (2, 0))
    moved = ConsumedTokens()
    moved.update((1,), (0, 2, 0), (3, 0))
    plain = ConsumedTokens()
    plain.update((1, 0), (2, 0), (3, 0))
    assert len({swapped.state, moved.state, plain.state}) == 3


def test_a_hash_goes_on_from_a_checkpoint() -> None:
    first = ConsumedTokens()
    first.update(ROWS[0].prompt_ids, ROWS[0].chosen_ids, ROWS[0].rejected_ids)
    resumed = ConsumedTokens(first.state, first.num_pairs)
    resumed.update(ROWS[1].prompt_ids, ROWS[1].chosen_ids, ROWS[1].rejected_ids)
    assert resumed.state == expected_tokens_sha256(ROWS, (0, 1))


def test_sorting_by_length_keeps_each_steps_rows_and_lowers_the_padding() -> None:
    lengths = [3, 50, 4, 48, 5, 52, 6, 47]
    rows = [
        TokenPair(str(i), str(i), (1,), (2,) * (length - 1), (3,) * (length - 1)) for i, length in enumerate(lengths)
    ]
    keys = {"epochs": 2, "batch_size": 4, "micro_batch_size": 2, "seed": 0}
    plain, grouped = make_plan(8, **keys), make_plan(8, **keys, lengths=lengths)
    assert [set(plain.order[i : i + 4]) for i in range(0, 16, 4)] == [
        set(grouped.order[i : i + 4]) for i in range(0, 16, 4)
    ]
    assert padding_share(rows, grouped) < padding_share(rows, plain)
    assert trained_tokens(rows, plain) == trained_tokens(rows, grouped) == 2 * 2 * sum(lengths)


def test_padding_is_what_the_longest_answer_of_a_micro_batch_leaves_empty() -> None:
    rows = [TokenPair("a", "a", (1,), (2, 3, 4), (5,)), TokenPair("b", "b", (1,), (2,), (3,))]
    plan = BatchPlan((0, 1), 2, 2)
    assert padding_share(rows, plan) == pytest.approx(1 - 10 / 16)  # four rows of width 4 hold 4, 2, 2 and 2 tokens
