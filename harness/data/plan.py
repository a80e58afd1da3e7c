"""The batch plan: which pairs, in which order, in which micro-batch; and the proof that a trainer kept to it.

One plan for each seed, given to every arm.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from harness.data.tokens import TokenPair, canonical_bytes
from harness.study.files import digest


@dataclass(frozen=True)
class BatchPlan:
    """The order in which rows are trained on.

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
    """Shuffle the rows anew for each epoch with a private generator: the global seed and other draws change nothing.

    Args:
        num_rows: number of training pairs.
        epochs: times that each row comes.
        batch_size: rows of an optimiser step.
        micro_batch_size: rows that are computed at once.
        seed: of the shuffle.
        lengths: of the rows; where given, each step's rows are sorted by it, so that its micro-batches hold rows alike.
            Which rows a step holds, and so its gradient, stays the same.
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
    """What one process computes at once.

    Attributes:
        rows: row numbers.
        weight: factor on the mean loss of its rows, so that the mean over processes and micro-batches is the step's.
            0 for a micro-batch that only keeps a process in step with the others.
        is_even: False in a step whose micro-batches are not alike on all processes.
    """

    rows: tuple[int, ...]
    weight: float = 1.0
    is_even: bool = True


def share_of(plan: BatchPlan, process: int, num_processes: int) -> list[MicroBatch]:
    """Return the micro-batches of one process; all processes together compute the plan, step by step.

    The micro-batches of a step go round the processes. A single process weighs each micro-batch of a step alike, 1/M;
    with N processes of K micro-batches each the trainer weighs them by 1/(K N), which differs in a short last step.

    Args:
        plan: the plan.
        process: number of the process, from 0.
        num_processes: how many there are; they must divide the number of micro-batches in a full step.
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
    """Count the tokens that a trainer reads over a plan: the prompt stands before each answer."""
    return sum(2 * len(rows[i].prompt_ids) + len(rows[i].chosen_ids) + len(rows[i].rejected_ids) for i in plan.order)


def padding_share(rows: Sequence[TokenPair], plan: BatchPlan) -> float:
    """Return the share of padding in what a trainer computes that pads each micro-batch to its longest answer."""
    real = padded = 0
    for start in range(0, len(plan.order), plan.micro_batch_size):
        batch = [rows[i] for i in plan.order[start : start + plan.micro_batch_size]]
        real += sum(2 * len(row.prompt_ids) + len(row.chosen_ids) + len(row.rejected_ids) for row in batch)
        padded += 2 * len(batch) * max(row.length for row in batch)
    return 1 - real / padded if padded else 0.0


class ConsumedTokens:
    """A running hash of the pairs that a trainer really saw, in order; each prompt once.

    The state is one digest and a count, so that it survives in a checkpoint.
    """

    def __init__(self, state: str = "", num_pairs: int = 0) -> None:
        self.state = state
        self.num_pairs = num_pairs

    def update(self, prompt_ids: Sequence[int], chosen_ids: Sequence[int], rejected_ids: Sequence[int]) -> None:
        """Add one pair: state = SHA-256(state, ids with lengths)."""
        content = canonical_bytes(prompt_ids, chosen_ids, rejected_ids)
        self.state = hashlib.sha256(self.state.encode() + content).hexdigest()
        self.num_pairs += 1


def expected_tokens_sha256(rows: Sequence[TokenPair], order: Iterable[int]) -> str:
    """Return the hash that a trainer must arrive at if it sees exactly the plan."""
    consumed = ConsumedTokens()
    for index in order:
        row = rows[index]
        consumed.update(row.prompt_ids, row.chosen_ids, row.rejected_ids)
    return consumed.state
