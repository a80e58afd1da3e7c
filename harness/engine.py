"""The paired engine's forward pass: TRL's trainers ask a model for the log-probs of a padded batch, and a packed one
gives them.

TRL's `DPOTrainer` calls `model(..., labels=labels, fused_lm_head=True)` for per-token log-probs; here the model answers
that call by `harness.packed`. The trainers, their losses and their metrics stay TRL's own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from trl.trainer.utils import FusedCausalLMOutput

from harness.head import HeadOutput, token_logps
from harness.packed import Packed, answer_sums, pack, packed_logps, packing
from harness.tokens import TokenPair

PROBE_TOLERANCE = 1e-3  # nats per answer token, relative to at least one nat; bf16 takes a hundred times as much
_probed: WeakKeyDictionary[Any, str] = WeakKeyDictionary()


def answer_packed_calls(model: Any, *, share_prefix: bool, completion_head: bool, metrics: Callable[[], bool]) -> None:
    """Make a model answer `fused_lm_head=True` from a packed batch; every other call is as before.

    Args:
        model: the causal LM itself, inside of any adapter; its attention must be `harness.packed.ATTENTION`.
        share_prefix: compute each prompt once for both answers.
        completion_head: run the head on the rows that predict an answer's token only.
        metrics: says at each call whether TRL's extra metrics are wanted; else they are 0.
    """
    before = model.forward

    @functools.wraps(type(model).forward)
    def forward(*args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return before(*args, **kwargs)
        input_ids, labels = kwargs["input_ids"], kwargs["labels"]
        packed = pack(_groups(input_ids, kwargs["attention_mask"], labels, share_prefix), input_ids.device)
        wanted = metrics()
        run = packed_logps if completion_head else _logps_of_all_rows
        return _padded(run(model, packed, metrics=wanted), packed, labels[:, 1:] != -100)

    model.forward = forward


def _groups(input_ids: Any, attention_mask: Any, labels: Any, share_prefix: bool) -> list[Any]:
    """Read prompts and answers out of TRL's layout: all chosen rows, then all rejected ones."""
    attended, answered = attention_mask.bool(), labels != -100
    rows = [
        (ids[mask & ~answer].tolist(), ids[answer].tolist())
        for ids, mask, answer in zip(input_ids, attended, answered, strict=True)
    ]
    half = len(rows) // 2
    pairs = list(zip(rows[:half], rows[half:], strict=True))
    if not share_prefix:
        return [(prompt, [answer]) for pair in pairs for prompt, answer in pair]
    return [(chosen[0], [chosen[1], rejected[1]]) for chosen, rejected in pairs]


def _logps_of_all_rows(model: Any, packed: Packed, *, metrics: bool) -> HeadOutput:
    """Run the head on every row, as a trainer without a completion-only head does; what is not asked for is dropped."""
    hidden = model.base_model(
        input_ids=packed.input_ids, position_ids=packed.position_ids, use_cache=False, packed=packed
    ).last_hidden_state[0]
    rest = torch.ones(len(hidden), dtype=torch.bool, device=hidden.device)
    rest[packed.predicting] = False
    rows = torch.cat([packed.predicting, rest.nonzero().squeeze(1)])
    targets = torch.cat([packed.targets, packed.targets.new_zeros(int(rest.sum()))])
    found = token_logps(model, hidden[rows], targets, metrics=metrics)
    count = len(packed.targets)
    cut = {name: value if value is None else value[:count] for name, value in vars(found).items()}
    return HeadOutput(**cut)  # type: ignore[arg-type]


def _padded(found: Any, packed: Packed, mask: Any) -> FusedCausalLMOutput:
    """Lay values of packed answers (chosen, rejected, chosen, ...) out as TRL reads them: (2 * pairs, width - 1)."""

    def lay_out(values: Any, dtype: Any = torch.float32) -> Any:
        blank = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
        if values is None:
            return blank
        answers = values.to(dtype).split(packed.lengths)
        return blank.masked_scatter(mask, torch.cat([*answers[::2], *answers[1::2]]))

    return FusedCausalLMOutput(
        log_probs=lay_out(found.log_probs),
        entropy=lay_out(found.entropy),
        mean_logits=lay_out(found.mean_logits),
        is_top1=lay_out(found.is_top1, torch.bool),
        label_mask=mask,
    )


def packing_problem(model: Any, rows: Sequence[TokenPair], padded: Callable[..., torch.Tensor]) -> str:
    """Say why a model cannot be run packed, or nothing: the shortest pair is computed both ways and compared.

    Args:
        model: the causal LM.
        rows: the pairs that are to be run.
        padded: `(model, rows) -> (num_rows, 2)`, the padded computation to compare with.
    """
    shortest, longest = min(rows, key=_length), max(rows, key=_length)
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    if window is not None and longest.length > window:
        return f"its attention has a sliding_window of {window}, shorter than the longest pair of {longest.length}"
    if model in _probed:
        return _probed[model]
    tolerance = PROBE_TOLERANCE * (1 if model.dtype == torch.float32 else 100)
    problem = ""
    try:
        with torch.no_grad(), packing(model):
            packed = pack([(shortest.prompt_ids, [shortest.chosen_ids, shortest.rejected_ids])], model.device)
            ours = answer_sums(packed_logps(model, packed).log_probs, packed).cpu()
    except Exception as error:  # a model may fail on packed input in any way; then it is run padded
        problem = f"{type(error).__name__}: {error}"
    else:
        lengths = torch.tensor([len(shortest.chosen_ids), len(shortest.rejected_ids)])
        gap = float(((ours - padded(model, [shortest])[0]).abs() / lengths).max())
        if not gap <= tolerance:
            problem = f"its log-probs differ by {gap:.2g} nats a token from the padded ones"
    _probed[model] = problem
    return problem


def _length(row: TokenPair) -> int:
    return row.length
