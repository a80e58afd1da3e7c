"""Summed log-probabilities of given answers under a model: for DPO's reference and for held-out preference accuracy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from tqdm import tqdm

from harness.tokens import TokenPair

MAX_BATCH_TOKENS = 4096
MAX_LOGITS_BYTES = 256 * 2**20


@torch.no_grad()
def pair_logps(model: Any, rows: Sequence[TokenPair], *, pad_id: int, desc: str) -> torch.Tensor:
    """Return the log-probs of both answers, summed over their tokens (the turn's end included), in nats.

    Returns:
        float64, shape (num_pairs, 2): chosen, rejected; in the order of `rows`.
    """
    model.eval()
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
