"""Rows and seed -> the batch plan: the order of the pairs, their micro-batches, and the hash of their tokens.

There is one plan per seed for all arms. The hash proves that a trainer kept to it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from harness.data.token_rows import TokenPair, as_rows, canonical_bytes, lengths_of, pair_lengths
from harness.study.files import digest


@dataclass(frozen=True)
class BatchPlan:
    """The order of the training rows.

    Attributes:
        order: row numbers, epoch after epoch. Micro-batches are runs of `micro_batch_size`, optimiser steps runs of
            `batch_size`; a step may straddle two epochs, so that only the last one can be short.
    """

    order: tuple[int, ...]
    batch_size: int
    micro_batch_size: int

    @property
    def num_steps(self) -> int:
        """Number of optimiser steps, a short last one included."""
        return -(-len(self.order) // self.batch_size)

    @property
    def sha256(self) -> str:
        """Identify the plan."""
        return digest([list(self.order), self.batch_size, self.micro_batch_size])


def make_plan(
    num_rows: int, *, epochs: int, batch_size: int, micro_batch_size: int, seed: int, lengths: Sequence[int] = ()
) -> BatchPlan:
    """Shuffle the rows per epoch with a private generator, independent of the global seed and of other draws.

    Args:
        num_rows: number of training pairs.
        epochs: passes over the rows.
        batch_size: rows per optimiser step.
        micro_batch_size: rows per forward pass.
        seed: of the shuffle.
        lengths: of the rows; where given, the rows of a step are sorted by it, so that micro-batches need less
            padding. The set of rows in a step, and so its gradient, stays the same.
    """
    order: list[int] = []
    for epoch in range(epochs):
        order += np.random.default_rng([seed, epoch]).permutation(num_rows).tolist()
    if lengths:
        steps = (order[start : start + batch_size] for start in range(0, len(order), batch_size))
        order = [row for step in steps for row in sorted(step, key=lambda i: lengths[i], reverse=True)]
    return BatchPlan(tuple(order), batch_size, micro_batch_size)


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one forward pass of one process.

    Attributes:
        rows: row numbers.
        weight: factor on the mean loss of its rows, so that the mean over processes and micro-batches is the step's.
            0 for a micro-batch that only keeps a process in step with the others.
        is_even: False in a step whose micro-batches differ between the processes.
    """

    rows: tuple[int, ...]
    weight: float = 1.0
    is_even: bool = True


def share_of(plan: BatchPlan, process: int, num_processes: int) -> list[MicroBatch]:
    """Return the micro-batches of one process; all processes together compute the plan, step by step.

    The micro-batches of a step are dealt to the processes in turn. A single process weighs each of M micro-batches by
    1/M. With N processes of K micro-batches each the trainer weighs them by 1/(K N), which differs in a short last
    step; `weight` corrects it.

    Args:
        plan: the plan.
        process: number of the process, from 0.
        num_processes: number of processes; it must divide the number of micro-batches in a full step.
    """
    share = []
    for start in range(0, len(plan.order), plan.batch_size):
        step = plan.order[start : start + plan.batch_size]
        parts = [step[i : i + plan.micro_batch_size] for i in range(0, len(step), plan.micro_batch_size)]
        rounds = -(-len(parts) // num_processes)
        weight = rounds * num_processes / len(parts)
        is_even = len(step) == plan.batch_size
        for part in range(process, rounds * num_processes, num_processes):
            own = parts[part] if part < len(parts) else parts[-1]
            share.append(MicroBatch(own, weight if part < len(parts) else 0.0, is_even))
    return share


def trained_tokens(rows: Sequence[TokenPair], plan: BatchPlan) -> int:
    """Count the tokens of a plan, with the prompt before each answer."""
    return int((lengths_of(rows) @ [2, 1, 1])[list(plan.order)].sum())


def padding_share(rows: Sequence[TokenPair], plan: BatchPlan) -> float:
    """Return the share of padding where each micro-batch is padded to its longest answer."""
    order, size = np.array(plan.order, dtype=np.int64), plan.micro_batch_size
    if not len(order):
        return 0.0
    widths = pair_lengths(rows)[order]
    longest = np.maximum.reduceat(widths, np.arange(0, len(order), size))
    padded = 2 * int(np.repeat(longest, size)[: len(order)].sum())
    return 1 - trained_tokens(rows, plan) / padded


class ConsumedTokens:
    """A running hash of the pairs that reached the trainer, in order, with each prompt once.

    The state is one digest and a count, so that it survives in a checkpoint.
    """

    def __init__(self, state: str = "", num_pairs: int = 0) -> None:
        self.state = state
        self.num_pairs = num_pairs

    def update(self, prompt_ids: Sequence[int], chosen_ids: Sequence[int], rejected_ids: Sequence[int]) -> None:
        """Add one pair: state = SHA-256(state, ids with lengths)."""
        self.add(canonical_bytes(prompt_ids, chosen_ids, rejected_ids))

    def add(self, content: bytes) -> None:
        """Add one pair by its `canonical_bytes`."""
        self.state = hashlib.sha256(self.state.encode() + content).hexdigest()
        self.num_pairs += 1


def expected_tokens_sha256(rows: Sequence[TokenPair], order: Iterable[int]) -> str:
    """Return the hash of a trainer that consumes exactly the plan."""
    consumed, pairs = ConsumedTokens(), as_rows(rows)
    for number in order:
        consumed.add(pairs.canonical_bytes(number))
    return consumed.state
