"""Summed log-probabilities of given answers under a model: for DPO's reference and for held-out preference accuracy."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from tqdm import tqdm

from harness.data.tokens import TokenPair
from harness.train.packed import answer_sums, pack, packed_logps, packing, packing_problem

MAX_BATCH_TOKENS = 2048  # of activations; larger batches are no faster
MAX_LOGITS_BYTES = 256 * 2**20


@torch.no_grad()
def pair_logps(
    model: Any, rows: Sequence[TokenPair], *, pad_id: int, desc: str, share_prefix: bool = True
) -> torch.Tensor:
    """Return the log-probs of both answers, summed over their tokens (the turn's end included), in nats.

    Packed, each prompt once for both answers, where the model can; padded where it cannot.

    Args:
        model: a causal LM; it is put into evaluation mode.
        rows: the pairs.
        pad_id: padding.
        desc: text of the progress bar.
        share_prefix: False computes each prompt once for each answer.

    Returns:
        float64, shape (num_pairs, 2): chosen, rejected; in the order of `rows`.
    """
    model.eval()
    if not rows:
        return torch.zeros(0, 2, dtype=torch.float64)
    if why_padded(model, rows, pad_id):
        return _padded_logps(model, rows, pad_id=pad_id, desc=desc)
    sums = torch.zeros(len(rows), 2, dtype=torch.float64)
    with packing(model), tqdm(total=len(rows), desc=desc, delay=5, leave=False) as bar:
        for batch in _packed_batches(rows):
            answers = [(rows[i].prompt_ids, [rows[i].chosen_ids, rows[i].rejected_ids]) for i in batch]
            groups = answers if share_prefix else [(prompt, [answer]) for prompt, both in answers for answer in both]
            packed = pack(groups, model.device)
            sums[batch] = answer_sums(packed_logps(model, packed).log_probs, packed).view(-1, 2).cpu()
            bar.update(len(batch))
    return sums


def why_padded(model: Any, rows: Sequence[TokenPair], pad_id: int) -> str:
    """Say why a model cannot be run packed over these pairs, or nothing where it can."""
    return packing_problem(model, rows, functools.partial(_padded_logps, pad_id=pad_id, desc=""))


def _packed_batches(rows: Sequence[TokenPair]) -> Iterator[list[int]]:
    batch: list[int] = []
    tokens = 0
    for i, row in enumerate(rows):
        size = len(row.prompt_ids) + len(row.chosen_ids) + len(row.rejected_ids)
        if batch and tokens + size > MAX_BATCH_TOKENS:
            yield batch
            batch, tokens = [], 0
        batch.append(i)
        tokens += size
    if batch:
        yield batch


@torch.no_grad()
def _padded_logps(model: Any, rows: Sequence[TokenPair], *, pad_id: int, desc: str) -> torch.Tensor:
    answers = [(row.prompt_ids, answer) for row in rows for answer in (row.chosen_ids, row.rejected_ids)]
    sums = torch.zeros(len(answers), dtype=torch.float64)
    with tqdm(total=len(answers), desc=desc, delay=5, leave=False) as bar:
        for batch in _batches(answers, model.config.get_text_config().vocab_size):
            sums[batch] = _batch_logps(model, [answers[i] for i in batch], pad_id)
            bar.update(len(batch))
    return sums.view(-1, 2)


def _batches(answers: Sequence[tuple[Sequence[int], Sequence[int]]], vocab_size: int) -> Iterator[list[int]]:
    """Group answers of similar length, so that neither the padded ids nor the logits pass their bounds."""
    order = sorted(range(len(answers)), key=lambda i: len(answers[i][0]) + len(answers[i][1]))
    batch: list[int] = []
    longest_answer = 0
    for i in order:
        length = len(answers[i][0]) + len(answers[i][1])  # the longest so far, by the order
        longest = max(longest_answer, len(answers[i][1]))
        size = len(batch) + 1
        too_large = size * length > MAX_BATCH_TOKENS or size * longest * vocab_size * 4 > MAX_LOGITS_BYTES
        if batch and too_large:
            yield batch
            batch, longest = [], len(answers[i][1])
        batch.append(i)
        longest_answer = longest
    if batch:
        yield batch


def _batch_logps(model: Any, answers: Sequence[tuple[Sequence[int], Sequence[int]]], pad_id: int) -> torch.Tensor:
    """Pad on the left, so that all answers end at the last position and the head runs on those positions only."""
    width = max(len(prompt) + len(answer) for prompt, answer in answers)
    keep = max(len(answer) for _, answer in answers)
    ids = torch.full((len(answers), width), pad_id)
    attended = torch.zeros_like(ids)
    scored = torch.zeros((len(answers), keep), dtype=torch.bool)
    for i, (prompt, answer) in enumerate(answers):
        row = torch.tensor([*prompt, *answer])
        ids[i, -len(row) :] = row
        attended[i, -len(row) :] = 1
        scored[i, -len(answer) :] = True
    ids, attended = ids.to(model.device), attended.to(model.device)
    logits = model(
        input_ids=ids,
        attention_mask=attended,
        position_ids=(attended.cumsum(1) - 1).clamp(min=0),
        use_cache=False,
        logits_to_keep=keep + 1,
    ).logits[:, :-1]
    logits = logits.float()
    # Not log_softmax: its fp32 kernel is off by about 5e-6 nats a token at a vocabulary of 49,152, always upwards.
    logps = logits.gather(-1, ids[:, -keep:, None]).squeeze(-1) - logits.logsumexp(-1)
    return (logps * scored.to(logps.device)).sum(-1).double().cpu()
