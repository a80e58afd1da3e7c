"""Run answers through a causal LM with nothing computed twice: no padding, and a prompt once for all its answers.

All groups of a batch (a prompt and its answers) stand in one row of tokens. Positions start again after the prompt and
attention sees a token's own prompt and own answer only. (Wang and Hegde, arXiv 2410.20305, share prefixes by a mask
over the whole row; here each block is computed by itself, so that nothing is computed to be masked.) The head runs on
the rows that predict a token of an answer. What comes out equals the padded computation up to rounding.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from trl.kernels import ChunkedLogProbFunction
from trl.trainer.utils import FusedCausalLMOutput

from harness.data.tokens import TokenPair

ATTENTION = "harness_packed"
Ids = Sequence[int]


@dataclass(frozen=True)
class Packed:
    """A batch of groups as one row.

    Attributes:
        input_ids: shape (1, num_tokens); an answer's last token predicts nothing and is left out.
        position_ids: shape (1, num_tokens).
        spans: of each group the number of its tokens in the row, of the prompt and of the answers.
        masks: of each group which tokens an answer's token attends to, shape (answer tokens, prompt + answer tokens).
        predicting: shape (num_targets,), the rows of hidden states that predict the answers' tokens, in order.
        targets: shape (num_targets,), the tokens that they predict.
        lengths: number of tokens of each answer, in order.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    spans: tuple[tuple[int, int], ...]
    masks: tuple[torch.Tensor, ...]
    predicting: torch.Tensor
    targets: torch.Tensor
    lengths: tuple[int, ...]


def pack(groups: Sequence[tuple[Ids, Sequence[Ids]]], device: Any = "cpu") -> Packed:
    """Lay groups of a prompt's ids and its answers' ids out in one row."""
    ids: list[int] = []
    positions: list[int] = []
    predicting: list[int] = []
    spans, masks = [], []
    for prompt, answers in groups:
        start, end = len(ids), len(prompt)
        ids += prompt
        positions += range(end)
        for answer in answers:
            predicting += [start + end - 1, *range(len(ids), len(ids) + len(answer) - 1)]
            ids += answer[:-1]
            positions += range(end, end + len(answer) - 1)
        spans.append((end, len(ids) - start - end))
        masks.append(_mask(end, [len(answer) - 1 for answer in answers]).to(device))
    return Packed(
        torch.tensor([ids], device=device),
        torch.tensor([positions], device=device),
        tuple(spans),
        tuple(masks),
        torch.tensor(predicting, device=device),
        torch.tensor([token for _, answers in groups for answer in answers for token in answer], device=device),
        tuple(len(answer) for _, answers in groups for answer in answers),
    )


def _mask(prompt: int, answers: Sequence[int]) -> torch.Tensor:
    blocks = [torch.ones(length, length, dtype=torch.bool).tril() for length in answers]
    return torch.cat([torch.ones(sum(answers), prompt, dtype=torch.bool), torch.block_diag(*blocks)], dim=1)


def packed_attention(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, *, packed: Packed, scaling: float, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """Attend within each group: query (1, heads, num_tokens, head_dim) -> (1, num_tokens, heads, head_dim).

    Raises:
        NotImplementedError: for what this attention does not have, so that no model is computed wrongly.
    """
    window = kwargs.get("sliding_window")
    if window is not None and max(map(sum, packed.spans)) > window:
        raise NotImplementedError(f"the model's attention has a sliding_window of {window}, shorter than a pair")
    for name in ("softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"the model's attention has {name}")
    grouped = {"enable_gqa": key.shape[1] != query.shape[1], "scale": scaling}
    parts = []
    # Split, not sliced: the gradient of a slice is a tensor of zeros of the whole row's size, one for each slice.
    queries = query.split([length for span in packed.spans for length in span], dim=2)
    keys, values = (states.split([sum(span) for span in packed.spans], dim=2) for states in (key, value))
    for first, rest, k, v, mask in zip(queries[::2], queries[1::2], keys, values, packed.masks, strict=True):
        # Causal from the first query on, so that a prompt sees none of the answers' keys.
        parts.append(scaled_dot_product_attention(first, k, v, is_causal=True, **grouped))
        if rest.shape[2]:
            parts.append(scaled_dot_product_attention(rest, k, v, attn_mask=mask, **grouped))
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, packed_attention)


@contextlib.contextmanager
def packing(model: Any) -> Iterator[None]:
    """Give a model packed attention for as long as the block lasts; it can do nothing else meanwhile."""
    before = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def packed_logps(model: Any, packed: Packed, *, metrics: bool = False) -> HeadOutput:
    """Return the log-prob of each target, shape (num_targets,); inside `packing(model)` only."""
    backbone = model.base_model(
        input_ids=packed.input_ids, position_ids=packed.position_ids, use_cache=False, packed=packed
    )
    hidden = backbone.last_hidden_state[0, packed.predicting]
    return token_logps(model, hidden, packed.targets, metrics=metrics)


def answer_sums(logps: torch.Tensor, packed: Packed) -> torch.Tensor:
    """Sum log-probs by answer, in float64: shape (num_targets,) -> (num_answers,)."""
    return torch.stack([part.sum(dtype=torch.float64) for part in logps.split(packed.lengths)])


CHUNK_BYTES = 64 * 2**20
_TRL_VOCAB_CHUNK = 32768
METRICS = ("entropy", "mean_logits", "is_top1")


@dataclass(frozen=True)
class HeadOutput:
    """What the head gives for each row, shape (num_rows,); the metrics are None where they were not asked for."""

    log_probs: torch.Tensor
    entropy: torch.Tensor | None = None
    mean_logits: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None


def token_logps(model: Any, hidden: torch.Tensor, targets: torch.Tensor, *, metrics: bool = False) -> HeadOutput:
    """Return log p(target | hidden) of each row, in nats.

    A head that is not trained is differentiated here in one pass; one that is, or that scales or caps its logits, goes
    through TRL's kernel, which computes the logits again in the backward pass.

    Args:
        model: a causal LM.
        hidden: shape (num_rows, hidden_size), the backbone's last hidden states.
        targets: shape (num_rows,).
        metrics: also compute TRL's metrics.
    """
    head = model.get_output_embeddings()
    scale, cap = _logit_transform(model.config.get_text_config())
    plain = scale == 1.0 and cap is None and head.bias is None
    if plain and hidden.device.type == "cpu" and not head.weight.requires_grad:
        return HeadOutput(*_FrozenHead.apply(hidden, head.weight, targets, metrics))
    wanted = METRICS if metrics else ()
    logps, entropy, _, mean_logits, is_top1 = ChunkedLogProbFunction.apply(
        hidden, head.weight, head.bias, targets, 1.0, _TRL_VOCAB_CHUNK, cap, scale, wanted
    )
    return HeadOutput(logps, entropy, mean_logits, is_top1)


def _logit_transform(config: Any) -> tuple[float, float | None]:
    """Return the factor that a model's head puts on its logits, and their soft cap, as in `trl.add_fused_lm_head`."""
    scale = next(
        (
            float(getattr(config, name))
            for name in ("logit_scale", "output_multiplier", "lm_head_multiplier")
            if getattr(config, name, None) is not None
        ),
        None,
    )
    if scale is None and getattr(config, "logits_scaling", None) is not None:
        scale = config.logits_scaling if config.model_type == "hyperclovax" else 1 / config.logits_scaling
    return (1.0 if scale is None else scale), getattr(config, "final_logit_softcapping", None)


class _FrozenHead(torch.autograd.Function):
    """log softmax(h W^T)[y] with its gradient W[y] - softmax(h W^T) W, taken while the logits are there.

    The loss is linear in each log-prob's gradient, so that the backward pass only scales: two products with the head's
    weight for each row, where recomputing the logits would take three.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Any, weight: Any, targets: Any, metrics: bool) -> Any:
        num_rows = len(hidden)
        logps = hidden.new_empty(num_rows)
        grads = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        found = [hidden.new_empty(num_rows) for _ in range(2)] + [targets.new_empty(num_rows, dtype=torch.bool)]
        size = max(1, CHUNK_BYTES // (weight.shape[0] * weight.element_size()))
        for start in range(0, num_rows, size):
            part = slice(start, start + size)
            logits = hidden[part] @ weight.t()
            # Not log_softmax: its fp32 kernel is off by about 5e-6 nats a token at a vocabulary of 49,152.
            norm = logits.logsumexp(-1, keepdim=True)
            chosen = logits.gather(1, targets[part, None])
            logps[part] = (chosen - norm).squeeze(1)
            if metrics:
                found[1][part] = logits.mean(-1)
                found[2][part] = logits.argmax(-1) == targets[part]
            probs = logits.sub_(norm)
            if metrics:
                found[0][part] = -(probs.exp() * probs).sum(-1)
            if grads is not None:
                torch.mm(probs.exp_(), weight, out=grads[part])
                torch.sub(weight[targets[part]], grads[part], out=grads[part])
        ctx.save_for_backward(grads)
        ctx.mark_non_differentiable(*found)
        return logps, *(found if metrics else (None, None, None))

    @staticmethod
    def backward(ctx: Any, grad: Any, *_: Any) -> Any:
        (grads,) = ctx.saved_tensors
        return grad[:, None] * grads, None, None, None


PROBE_TOLERANCE = 1e-3  # nats per answer token, relative to at least one nat; bf16 takes a hundred times as much
_probed: WeakKeyDictionary[Any, str] = WeakKeyDictionary()


def answer_packed_calls(model: Any, *, share_prefix: bool, completion_head: bool, metrics: Callable[[], bool]) -> None:
    """Make a model answer `fused_lm_head=True` from a packed batch; every other call is as before.

    Args:
        model: the causal LM itself, inside of any adapter; its attention must be `harness.train.packed.ATTENTION`.
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
