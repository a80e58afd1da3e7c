"""Summed log-probabilities of given answers under a model: pairs of token ids -> (num_pairs, 2) in nats.

`pair_logps` computes them, packed where the model can be run so and padded elsewhere. `reference_logps` is the same for
DPO's reference, the SFT base, with a cache on disk that all trials and studies share. The key of an answer holds what
its log-prob depends on: the base's weights, dtype and kernel, and the ids of prompt and answer. It holds neither beta,
learning rate, seed nor LoRA initialisation, and no label: flipped or resampled pairs of the same answers hit the cache.
TRL's own cache misses on every point of a grid.

In bf16 a log-prob depends on the pairs in the same batch, too, by up to a nat: another number of rows is another order
of summation. There, and in TF32, the reference is computed as the policy is, in the same precision and in the plan's
own micro-batches, so that DPO starts at log 2; the micro-batches are a part of the key.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor
from tqdm import tqdm

from harness.data.plan import BatchPlan
from harness.data.token_rows import TokenisedPairs, TokenPair, as_rows, lengths_of, pair_lengths
from harness.study.errors import is_out_of_memory
from harness.study.files import Json, digest
from harness.train.attention import Call, kernel_problem, noted_calls, packing
from harness.train.base import is_quantised
from harness.train.layout import Layout, Way
from harness.train.memory import free_unused_memory
from harness.train.packed import (
    Ids,
    alone_logps,
    answer_sums,
    groups_of,
    pack,
    packed_hidden_states,
    packed_logps,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_BATCH_TOKENS = 2048  # of activations; larger batches are no faster
MAX_LOGITS_BYTES = 256 * 2**20
PROBE_TOLERANCE = 1e-3  # nats per answer token; in bf16 100 times as much
CHECKED_ROWS = 3  # cached rows that are computed again in each call; in bf16 as many micro-batches
REFERENCE_TOLERANCE = 1e-3  # nats per answer, in fp32 (noise between batch shapes is below 1e-4)
_LEAST_NOISE = 0.01  # nats per root of a token in bf16, where none is measured: another card has other kernels
_NOISE_TIMES = 6  # standard deviations of the measured noise that a cached value may be off
_KEY_BYTES = 16
_PROBE_RESULT = "harness_why_padded"  # attribute of a probed model
_CALLS = "harness_attention_calls"  # attribute of a model: what its layers ask of packed attention


@torch.no_grad()
def pair_logps(
    model: PreTrainedModel | PeftModel,
    rows: Sequence[TokenPair],
    *,
    pad_id: int,
    desc: str,
    share_prefix: bool = True,
    layout: Layout | None = None,
    batches: Sequence[Sequence[int]] | None = None,
    bf16: bool = False,
) -> Tensor:
    """Return the log-probs of both answers, summed over their tokens, the end of turn included, in nats.

    Where memory runs out, fewer pairs are computed at once.

    Args:
        model: a causal LM; it is put into evaluation mode.
        rows: the pairs.
        pad_id: padding.
        desc: text of the progress bar.
        share_prefix: False computes each prompt once per answer.
        layout: the study's; None tries the shortest pair packed.
        batches: row numbers of each forward pass; None makes batches for speed.
        bf16: compute as a policy in bf16 is computed, under autocast.

    Returns:
        float64, shape (num_pairs, 2): chosen, rejected; in the order of `rows`. Rows in no batch are 0.
    """
    model.eval()
    if isinstance(model, PeftModel):  # the causal LM inside of it, with the adapter in its layers
        model = model.get_base_model()
    if not rows:
        return torch.zeros(0, 2, dtype=torch.float64)
    way = layout.way if layout else "padded" if why_padded(model, rows, pad_id) else "packed"
    if way == "padded" and batches is None:
        return padded_logps(model, rows, pad_id=pad_id, desc=desc)
    shares, run = (share_prefix, packed_logps) if way == "packed" else (False, alone_logps)

    def compute(batch: Sequence[int]) -> Tensor:
        if way == "padded":
            return _padded_pair_logps(model, [rows[i] for i in batch], pad_id)
        packed = pack(groups_of([rows[i] for i in batch], share_prefix=shares)).to(model.device)
        return answer_sums(run(model, packed).log_probs, packed).view(-1, 2).cpu()

    sums = torch.zeros(len(rows), 2, dtype=torch.float64)
    attention = packing(model) if way == "packed" else contextlib.nullcontext()
    precision = torch.autocast(model.device.type, torch.bfloat16, enabled=bf16)
    with attention, precision, tqdm(total=len(rows), desc=desc, delay=5, leave=False) as bar:
        for batch, found in _as_memory_allows(_packed_batches(rows) if batches is None else batches, compute):
            sums[batch] = found
            bar.update(len(batch))
    return sums


def _as_memory_allows(
    batches: Iterable[Sequence[int]], compute: Callable[[Sequence[int]], Tensor]
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield batches with their results; one that does not fit into memory is halved, and so are those after it.

    Raises:
        Exception: of a single pair that does not fit.
    """
    most = sys.maxsize
    for batch in batches:
        done = 0
        while done < len(batch):
            part = list(batch[done : done + most])
            found = _unless_out_of_memory(compute, part)
            if found is None:
                most = len(part) // 2
                free_unused_memory()  # here, and not where the error and its traceback hold what did not fit
                continue
            yield part, found
            done += len(part)


def _unless_out_of_memory(compute: Callable[[Sequence[int]], Tensor], part: Sequence[int]) -> Tensor | None:
    try:
        return compute(part)
    except Exception as error:
        if len(part) == 1 or not is_out_of_memory(error):
            raise
        return None


def _packed_batches(rows: Sequence[TokenPair]) -> Iterator[list[int]]:
    """Yield row numbers in order, in batches of at most `MAX_BATCH_TOKENS` tokens where a pair is no longer."""
    batch: list[int] = []
    tokens = 0
    for i, size in enumerate(lengths_of(rows).sum(1).tolist()):
        if batch and tokens + size > MAX_BATCH_TOKENS:
            yield batch
            batch, tokens = [], 0
        batch.append(i)
        tokens += size
    if batch:
        yield batch


@torch.no_grad()
def padded_logps(model: PreTrainedModel, rows: Sequence[TokenPair], *, pad_id: int, desc: str = "") -> Tensor:
    """Return what `pair_logps` returns, computed on padded batches."""
    answers = [(row.prompt_ids, answer) for row in rows for answer in (row.chosen_ids, row.rejected_ids)]
    sums = torch.zeros(len(answers), dtype=torch.float64)
    with tqdm(total=len(answers), desc=desc, delay=5, leave=False) as bar:
        batches = _padded_batches(answers, model.config.get_text_config().vocab_size)

        def compute(batch: Sequence[int]) -> Tensor:
            return _padded_batch_logps(model, [answers[i] for i in batch], pad_id)

        for batch, found in _as_memory_allows(batches, compute):
            sums[batch] = found
            bar.update(len(batch))
    return sums.view(-1, 2)


def _padded_pair_logps(model: PreTrainedModel, rows: Sequence[TokenPair], pad_id: int) -> Tensor:
    """Return the log-probs of pairs in one batch, laid out as TRL's trainers do: all chosen rows, then all rejected."""
    answers = [(row.prompt_ids, row.chosen_ids) for row in rows] + [(row.prompt_ids, row.rejected_ids) for row in rows]
    return _padded_batch_logps(model, answers, pad_id).view(2, -1).t()


def _padded_batches(answers: Sequence[tuple[Ids, Ids]], vocab_size: int) -> Iterator[list[int]]:
    """Group answers of similar length, so that neither the padded ids nor the logits pass their bounds."""
    order = sorted(range(len(answers)), key=lambda i: len(answers[i][0]) + len(answers[i][1]))
    batch: list[int] = []
    for i in order:
        size = (len(batch) + 1) * (len(answers[i][0]) + len(answers[i][1]))  # the longest so far, by the order
        if batch and (size > MAX_BATCH_TOKENS or size * vocab_size * 4 > MAX_LOGITS_BYTES):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _padded_batch_logps(model: PreTrainedModel, answers: Sequence[tuple[Ids, Ids]], pad_id: int) -> Tensor:
    logps, scored = _padded_token_logps(model, answers, pad_id)
    return (logps * scored).sum(-1).double().cpu()


def _padded_token_logps(
    model: PreTrainedModel, answers: Sequence[tuple[Ids, Ids]], pad_id: int
) -> tuple[Tensor, Tensor]:
    """Return log-probs of each row's next tokens, and which of them are an answer's: (num_answers, width - 1).

    Rows are padded on the right, as TRL's trainers do: no model that reads from left to right sees the padding.
    """
    width = max(len(prompt) + len(answer) for prompt, answer in answers)
    ids = torch.full((len(answers), width), pad_id)
    attended = torch.zeros_like(ids)
    scored = torch.zeros((len(answers), width - 1), dtype=torch.bool)
    for i, (prompt, answer) in enumerate(answers):
        length = len(prompt) + len(answer)
        ids[i, :length] = torch.tensor([*prompt, *answer])
        attended[i, :length] = 1
        scored[i, len(prompt) - 1 : length - 1] = True
    ids, attended = ids.to(model.device), attended.to(model.device)
    logits = model(input_ids=ids, attention_mask=attended, use_cache=False).logits[:, :-1].float()
    # Not log_softmax: its fp32 kernel is off by about 5e-6 nats per token at a vocabulary of 49,152, always upwards.
    logps: Tensor = logits.gather(-1, ids[:, 1:, None]).squeeze(-1) - logits.logsumexp(-1)
    return logps, scored.to(logps.device)


def why_padded(model: PreTrainedModel, rows: Sequence[TokenPair], pad_id: int) -> str:
    """Return why these pairs cannot be run packed, or nothing where they can.

    The shortest pair is computed both ways and compared, once per model: the model keeps the result.

    Raises:
        torch.OutOfMemoryError: where memory runs out, which says nothing about packing.
    """
    known: dict[str, str] = vars(model)  # not getattr, by which an adapter's model answers for its base
    if _PROBE_RESULT not in known:
        known[_PROBE_RESULT] = _probe(model, rows[int(pair_lengths(rows).argmin())], pad_id)
    return known[_PROBE_RESULT] or packing_problem(model, rows, model.dtype)


def packing_problem(model: PreTrainedModel, rows: Sequence[TokenPair], dtype: torch.dtype) -> str:
    """Return what the model's attention needs that packed attention cannot compute on these pairs, or nothing.

    Args:
        model: a causal LM.
        rows: the pairs.
        dtype: that attention computes in, in training.
    """
    longest = int(pair_lengths(rows).max())
    for name, size in _windows(model).items():
        if size < longest and not _is_handed(model, rows, name, size):
            return f"its {name} of {size} is shorter than the longest pair of {longest} tokens"
    if model.device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return ""
    calls = _attention_calls(model, rows)
    needed = {call if call.window and call.window < longest else replace(call, window=None) for call in calls}
    problems = (kernel_problem(call, dtype, model.device) for call in sorted(needed, key=str))
    return next(filter(None, problems), "")


def _windows(model: PreTrainedModel) -> dict[str, int]:
    """Return the settings of a model that limit how far back its attention sees, by name."""
    return {
        name: size
        for name, size in vars(model.config.get_text_config()).items()
        if re.search(r"window(_size)?$|^attention_chunk_size$", name)
        and isinstance(size, int)
        and not isinstance(size, bool)
        and size > 0
    }


def _is_handed(model: PreTrainedModel, rows: Sequence[TokenPair], name: str, size: int) -> bool:
    """Return whether layers name a window to their attention, which computes it; chunks are in masks alone."""
    return name != "attention_chunk_size" and size in {call.window for call in _attention_calls(model, rows)}


@torch.no_grad()
def _attention_calls(model: PreTrainedModel, rows: Sequence[TokenPair]) -> frozenset[Call]:
    """Return what the model's layers ask of packed attention, from its shortest pair; the model keeps the result."""
    known: dict[str, frozenset[Call]] = vars(model)
    if _CALLS not in known:
        shortest = rows[int(pair_lengths(rows).argmin())]
        packed = pack(groups_of([shortest], share_prefix=True)).to(model.device)
        with packing(model), noted_calls() as calls:
            packed_hidden_states(model, packed)
        known[_CALLS] = frozenset(calls)
    return known[_CALLS]


@torch.no_grad()
def answer_token_logps(
    model: PreTrainedModel, rows: Sequence[TokenPair], way: Way, *, pad_id: int, share_prefix: bool = True
) -> list[Tensor]:
    """Return the log-probs of each answer's tokens, chosen before rejected, in the model's present mode.

    Args:
        model: a causal LM.
        rows: the pairs, in one batch.
        way: of running it.
        pad_id: padding.
        share_prefix: as in `pair_logps`.
    """
    if way == "padded":
        answers = [(row.prompt_ids, answer) for row in rows for answer in (row.chosen_ids, row.rejected_ids)]
        logps, scored = _padded_token_logps(model, answers, pad_id)
        return [part[mask].cpu() for part, mask in zip(logps, scored, strict=True)]
    shares, run = (share_prefix, packed_logps) if way == "packed" else (False, alone_logps)
    with packing(model) if way == "packed" else contextlib.nullcontext():
        packed = pack(groups_of(rows, share_prefix=shares)).to(model.device)
        return list(run(model, packed).log_probs.float().cpu().split(packed.lengths))


class LookAhead(NamedTuple):
    """How far log-probs before a changed token change, and float noise (0 where they do not change at all); in nats."""

    gap: float
    noise: float


@torch.no_grad()
def look_ahead(model: PreTrainedModel, ids: Sequence[int]) -> LookAhead:
    """Return whether tokens see later ones: the last token is changed, then the last two, in rows of one length.

    Two tokens, since blocks that see all of themselves may begin with the last one. All next tokens' log-probs count:
    a token that sees the next one would show it in no log-prob of another target. The noise is the smaller one of two:
    of the row with another row beside it, in one shape (0 but for routers, which deal tokens to experts together), and
    of the row with itself beside it (which no look into the other row can raise).

    Args:
        model: a causal LM in evaluation mode.
        ids: of one row, at least 2.
    """

    def next_logps(*rows: Sequence[int]) -> Tensor:
        logits = model(input_ids=torch.tensor(rows, device=model.device), use_cache=False).logits[0].float()
        return logits - logits.logsumexp(-1, keepdim=True)

    def gap(ours: Tensor, theirs: Tensor) -> float:
        return float((ours - theirs).abs().max())

    alone = next_logps(ids)
    changed = [_with_other_ends(ids, count) for count in range(1, min(3, len(ids)))]
    gaps = [gap(next_logps(row)[: len(ids) - n], alone[: len(ids) - n]) for n, row in enumerate(changed, start=1)]
    if max(gaps) == 0:  # then the noise decides nothing
        return LookAhead(0.0, 0.0)
    doubled = next_logps(ids, ids)
    noise = min(gap(alone, doubled), max(gap(next_logps(ids, row), doubled) for row in changed))
    if any(re.search(r"expert|moe", name, re.IGNORECASE) for name, _ in model.named_modules()):
        noise = max(noise, torch.finfo(model.dtype).eps * float(alone.abs().max()))  # a few rows may show none
    return LookAhead(max(gaps), noise)


def _with_other_ends(ids: Sequence[int], count: int) -> list[int]:
    """Return a row with other tokens, of the same row where there are any, in its last `count` places."""
    return [*ids[:-count], *(next(token for token in (*ids, 0, 1) if token != end) for end in ids[-count:])]


def forget_probe(model: PreTrainedModel) -> None:
    """Probe a model again when it is run next: for a caller that has changed how it attends."""
    for kept in (_PROBE_RESULT, _CALLS):
        vars(model).pop(kept, None)


@torch.no_grad()
def _probe(model: PreTrainedModel, row: TokenPair, pad_id: int) -> str:
    """Compute one pair packed and padded; return the difference or the error in words, or nothing."""
    try:
        with packing(model):
            packed = pack(groups_of([row], share_prefix=True)).to(model.device)
            ours = answer_sums(packed_logps(model, packed).log_probs, packed).cpu()
    except Exception as error:  # a model may fail on packed input in any way; then it is run padded
        if is_out_of_memory(error):
            raise
        return f"{type(error).__name__}: {error}"
    lengths = torch.tensor([len(row.chosen_ids), len(row.rejected_ids)])
    gap = float(((ours - padded_logps(model, [row], pad_id=pad_id)[0]).abs() / lengths).max())
    tolerance = PROBE_TOLERANCE * (1 if model.dtype == torch.float32 else 100)
    return "" if gap <= tolerance else f"its log-probs differ by {gap:.2g} nats per token from the padded ones"


class StaleReferenceError(RuntimeError):
    """A cached reference log-prob differs from the one that the base gives now."""


class BatchNoise(NamedTuple):
    """How far the log-prob of an answer moves with the pairs in its batch, in nats: on average, and at most.

    Rounding errors of tokens add up as a random walk does: per root of a token, short and long answers have the same.
    """

    mean: float
    largest: float
    per_root_token: float


class AsTrained(NamedTuple):
    """How a policy in bf16 or TF32 computes log-probs, and its reference with it: in which batches, and how noisily."""

    batches: Sequence[Sequence[int]]
    noise: BatchNoise
    bf16: bool = True


def as_trained(
    base: PreTrainedModel,
    rows: Sequence[TokenPair],
    plan: BatchPlan,
    *,
    pad_id: int,
    share_prefix: bool = True,
    layout: Layout | None = None,
    bf16: bool = True,
) -> AsTrained:
    """Return the plan's micro-batches, and their noise on this model: some of them against batches of another size.

    Args:
        base: the SFT base.
        rows: the training pairs.
        plan: their order.
        pad_id, share_prefix, layout, bf16: as in `pair_logps`.
    """
    batches = _first_epoch(plan, len(rows))
    some = [batches[i] for i in np.random.default_rng(len(batches)).permutation(len(batches))[:CHECKED_ROWS]]
    numbers = sorted({number for batch in some for number in batch})
    size = 1 if max(map(len, some)) > 1 else 2
    others = [numbers[start : start + size] for start in range(0, len(numbers), size)]
    compute = functools.partial(
        pair_logps,
        base,
        rows,
        pad_id=pad_id,
        desc="noise of the reference",
        share_prefix=share_prefix,
        layout=layout,
        bf16=bf16,
    )
    first, second = (compute(batches=each)[numbers] for each in (some, others))
    gaps = (first - second).abs()
    tokens = torch.tensor([[len(rows[i].chosen_ids), len(rows[i].rejected_ids)] for i in numbers])
    noise = BatchNoise(float(gaps.mean()), float(gaps.max()), float((gaps**2 / tokens).mean().sqrt()))
    return AsTrained(batches, noise, bf16)


def _first_epoch(plan: BatchPlan, num_rows: int) -> list[list[int]]:
    """Return the plan's micro-batches until each row has had its turn."""
    left, batches = set(range(num_rows)), []
    for start in range(0, len(plan.order), plan.micro_batch_size):
        if not left:
            break
        batches.append(list(plan.order[start : start + plan.micro_batch_size]))
        left -= set(batches[-1])
    return batches


def reference_logps(
    pairs: TokenisedPairs,
    base: PreTrainedModel,
    *,
    base_sha256: str,
    pad_id: int,
    cache: Path,
    share_prefix: bool = True,
    layout: Layout | None = None,
    trained: AsTrained | None = None,
) -> Tensor:
    """Return the base's log-probs of all pairs; answers in the cache are not computed again, but for a few as a check.

    Any number of processes may write at once: each adds a file of its own under a temporary name and renames it.

    Args:
        pairs: the pairs.
        base: the SFT base's model.
        base_sha256: of its weights.
        pad_id: padding.
        cache: folder of all caches.
        share_prefix, layout: as in `pair_logps`.
        trained: how the policy computes its own, where that is in bf16 or TF32; a cached value may be off by the noise.

    Returns:
        float64, shape (num_pairs, 2): chosen, rejected.

    Raises:
        StaleReferenceError: where a cached value differs from the base's.
    """
    way = layout.way if layout else "padded" if why_padded(base, pairs.rows, pad_id) else "packed"
    compute = functools.partial(
        _computed, base, pairs.rows, pad_id=pad_id, share_prefix=share_prefix, layout=Layout(way), trained=trained
    )
    folder = cache / _cache_key(base, base_sha256, way, pairs, trained)
    known = _read_cache(folder)
    rows = as_rows(pairs.rows)
    keys = [[_key_of(content) for content in rows.answer_bytes(number)] for number in range(len(rows))]
    found = np.array([[known.get(key, np.nan) for key in both] for both in keys]).reshape(-1, 2)
    missing = np.flatnonzero(np.isnan(found).any(axis=1))
    cached = np.setdiff1d(np.arange(len(keys)), missing)
    if len(cached):
        checked = np.random.default_rng(len(cached)).permutation(cached)[:CHECKED_ROWS]
        gaps = np.abs(found[checked] - compute(checked, desc="checking the reference"))
        if (gaps > _tolerance(pairs.rows, checked, trained)).any():
            raise StaleReferenceError(
                f"{folder}: the cached reference log-probs are not the base's; delete the folder and run again"
            )
    if len(missing):
        found[missing] = compute(missing, desc="reference log-probs")
        _write_cache(folder, {key: sum_ for i in missing for key, sum_ in zip(keys[i], found[i], strict=True)})
    return torch.from_numpy(found)


def _computed(
    base: PreTrainedModel,
    rows: Sequence[TokenPair],
    wanted: np.ndarray,
    *,
    trained: AsTrained | None,
    pad_id: int,
    desc: str,
    share_prefix: bool,
    layout: Layout,
) -> np.ndarray:
    """Return the log-probs of some rows, (num_wanted, 2); as they are trained, each row in its own batch."""
    run = functools.partial(pair_logps, base, pad_id=pad_id, desc=desc, share_prefix=share_prefix, layout=layout)
    if trained is None:
        return run([rows[i] for i in wanted]).numpy()
    numbers = set(wanted.tolist())
    own = [batch for batch in trained.batches if numbers & set(batch)]
    return run(rows, batches=own, bf16=trained.bf16).numpy()[wanted]


def _tolerance(rows: Sequence[TokenPair], numbers: np.ndarray, trained: AsTrained | None) -> np.ndarray:
    """Return how far cached log-probs may be off, (num_numbers, 2)."""
    tokens = np.array([[len(rows[i].chosen_ids), len(rows[i].rejected_ids)] for i in numbers])
    if trained is None:
        return np.full(tokens.shape, REFERENCE_TOLERANCE)
    least = _LEAST_NOISE if trained.bf16 else _LEAST_NOISE / 8  # TF32 has 3 bits more
    return _NOISE_TIMES * max(trained.noise.per_root_token, least) * np.sqrt(tokens)


def _cache_key(
    base: PreTrainedModel, base_sha256: str, way: Way, pairs: TokenisedPairs, trained: AsTrained | None
) -> str:
    """Return the name of the folder for one base in one dtype, kernel, device type and version of torch.

    As trained, also for the GPU's name, whose kernels sum in an order of their own, and for what stands in one batch.
    """
    kernel = base.config._attn_implementation if way == "padded" else way
    about: list[Json] = [base_sha256, str(base.dtype), kernel, base.device.type, torch.__version__]
    if is_quantised(base):
        about.append("nf4")
    if trained is not None:
        card = torch.cuda.get_device_name(base.device) if base.device.type == "cuda" else ""
        precision = "autocast" if trained.bf16 else "tf32"
        about += [precision, card, pairs.sha256, [list(batch) for batch in trained.batches]]
    return digest(about)[:32]


def _key_of(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()[:_KEY_BYTES]


def _read_cache(folder: Path) -> dict[bytes, float]:
    """Read all parts; a part that is truncated or damaged is skipped, and its answers are computed again."""
    known: dict[bytes, float] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "numpy") as file:
                sealed = (file.metadata() or {}).get("sha256")
                keys, sums = file.get_tensor("keys"), file.get_tensor("sums")
        except (SafetensorError, OSError, UnicodeDecodeError):
            continue
        if sealed == _part_sha256(keys, sums):
            known |= zip((row.tobytes() for row in keys), sums.tolist(), strict=True)
    return known


def _write_cache(folder: Path, sums: dict[bytes, float]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    keys = np.frombuffer(b"".join(sums), dtype=np.uint8).reshape(-1, _KEY_BYTES)
    values = np.array(list(sums.values()), dtype=np.float64)
    name = hashlib.sha256(keys.tobytes()).hexdigest()[:32]
    temporary = folder / f".{name}.{os.getpid()}.tmp"
    save_file({"keys": keys, "sums": values}, temporary, metadata={"sha256": _part_sha256(keys, values)})
    temporary.replace(folder / f"{name}.safetensors")


def _part_sha256(keys: np.ndarray, sums: np.ndarray) -> str:
    return hashlib.sha256(keys.tobytes() + sums.tobytes()).hexdigest()
