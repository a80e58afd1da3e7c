"""What the GPU check measures, part by part. Made for `gpu.py`, which runs the parts and writes what they find."""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from gpu_harness import (
    DEVICE,
    GPU,
    Packed,
    Ran,
    TokenPair,
    answer,
    checksums,
    free_memory,
    give_back,
    loaded_adapter,
    log_probs,
    make_llama,
    matmul_rate,
    needed,
    num_tokens,
    pack_pairs,
    pairs_like_ultrafeedback,
    peak_gb,
    pretended_out_of_memory,
    reference_noise,
    reference_of,
    run_config,
    shape_of,
    small_study,
    sync,
    train,
    train_once,
    training_flops,
)
from gpu_stock import has_liger, train_stock
from transformers import AttentionInterface, LlamaForCausalLM

from harness.config.schema import RunConfig
from harness.train.attention import ATTENTION, Segments, attend_by, by_group, by_segment, call_of, packed_attention

Row = dict[str, Any]  # what JSON has: a number, a text, a yes or no, or a number for each step
Attention = Callable[..., tuple[torch.Tensor, None]]

ATTENTION_GAP = {"cuda": 2e-2, "cpu": 1e-5}  # in bf16 and in fp32, relative to the largest value
STEP_GAP = {"fp32": 1e-4, "bf16": 5e-2}  # relative, of a step's loss and gradient norm; the tests use 1e-4 for fp32
FIRST_LOSS_GAP = 1e-3  # of DPO's first loss to log 2
SLOW_MS = 1000  # one attention call; beyond it the harness's own attention gets fewer pairs
STEPS = ("loss", "grad_norm")  # a value for each step
PACKAGES = ("torch", "triton", "transformers", "trl", "peft", "accelerate", "datasets", "numpy")


AS_IT_IS, NO_CUDNN, VARLEN = "as it is", "without cuDNN", "varlen"  # torch's attention by groups; one call for all


def group_attention(
    _: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: None, **given: Any
) -> tuple[torch.Tensor, None]:
    """Attend by torch's attention, two calls for each pair, as the harness does on CPUs and in fp32."""
    segments, scaling = given.pop("packed"), given.pop("scaling")
    return by_group(query, key, value, segments, call_of(query, key, value, scaling, given)), None


def varlen_attention(
    _: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: None, **given: Any
) -> tuple[torch.Tensor, None]:
    """Attend as the harness does on GPUs in half precision; on a CPU by the same segments, one by one."""
    if GPU:
        return packed_attention(_, query, key, value, mask, **given)
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    segments: Segments = given.pop("packed")
    call = call_of(query, key, value, given.pop("scaling"), given)
    return attend_by(by_segment, q, k, v, segments, call)[None], None


@contextlib.contextmanager
def attention_as(kind: str) -> Iterator[None]:
    """Let the paired engine attend in one of the ways, with or without cuDNN in torch's choice of kernels."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    AttentionInterface.register(ATTENTION, varlen_attention if kind == VARLEN else group_attention)
    if GPU:
        torch.backends.cuda.enable_cudnn_sdp(before and kind != NO_CUDNN)
    try:
        yield
    finally:
        AttentionInterface.register(ATTENTION, packed_attention)
        if GPU:
            torch.backends.cuda.enable_cudnn_sdp(before)


@dataclass
class Found:
    """What a part has found so far.

    Attributes:
        on_change: called after each row, so that nothing is lost where the script is stopped.
        facts: single values.
        tables: rows by name, by the table's name; units are in the columns' names.
        checks: what has to hold before the figures are believed.
        targets: by name: `measured`, `target` and whether it is `reached`.
        errors: of the part, and of single rows.
    """

    on_change: Callable[[], None] = lambda: None
    facts: Row = field(default_factory=dict)
    tables: dict[str, dict[str, Row]] = field(default_factory=dict)
    checks: dict[str, bool] = field(default_factory=dict)
    targets: dict[str, Row] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)

    def aim(self, name: str, measured: float | None, *, most: float | None = None, least: float | None = None) -> None:
        """Note a target, and whether what was measured reaches it; nothing where it was not measured."""
        if measured is None:
            return
        reached = measured <= most if most is not None else measured >= (least or 0.0)
        target = f"at most {most:.3g}" if most is not None else f"at least {least:.3g}"
        self.targets[name] = {"measured": measured, "target": target, "reached": bool(reached)}

    def row(self, table: str, name: str, values: Row) -> None:
        """Note a row."""
        self.tables.setdefault(table, {})[name] = values
        print(f"  {table}, {name}: {values.get('error') or values.get('skipped') or 'done'}", file=sys.stderr)
        self.on_change()

    @contextlib.contextmanager
    def attempt(self, table: str, name: str) -> Iterator[Row]:
        """Yield a row to be filled; an error in the block is noted in the row and goes no further."""
        values: Row = {}
        try:
            yield values
        except Exception as error:
            values["error"] = described(error)
            self.errors.append(f"{table}, {name}: {values['error']}")
        free_memory()
        self.row(table, name, values)


def described(error: BaseException) -> str:
    """Return an error's class and the beginning of its text."""
    return f"{type(error).__name__}: {error}"[:400]


@dataclass(frozen=True)
class Settings:
    """How much is measured.

    Attributes:
        tiny: small shapes.
        steps: measured steps of 8 pairs in each run of the large model.
        shape: of the large model.
        folder: of the results.
        smollm2: a checkpoint's folder for the part of that name.
        pairs: a folder with train.jsonl, dev.jsonl and golden.jsonl, for the same part.
        cap_gb: GB of the card for the trial that must run out of memory.
        deadline: when no new work begins, on the clock of `time.perf_counter`.
        later: seconds that the parts after this one need at least.
        before: the parts that have been run.
    """

    tiny: bool
    steps: int
    shape: str
    cap_gb: float
    deadline: float
    later: float = 0.0
    folder: Path = Path()
    smollm2: Path | None = None
    pairs: Path | None = None
    before: dict[str, Found] = field(default_factory=dict)

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.perf_counter()


def machine(settings: Settings, found: Found) -> None:
    """The card, the versions and the rate of large matrix products, in bf16 on a GPU and in fp32 on a CPU."""
    found.facts |= {"device": device_name(), "cpus": os.cpu_count(), "python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found.facts[name] = version(name)
    if GPU:
        about = torch.cuda.get_device_properties(0)
        found.facts |= {
            "memory_gb": about.total_memory / 1e9,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "bf16": torch.cuda.is_bf16_supported(),
            "cudnn_attention": torch.backends.cuda.cudnn_sdp_enabled(),
            "tf32": torch.backends.cuda.matmul.allow_tf32,
        }
    size, seconds = (256, 0.1) if settings.tiny else (8192, 1.0)
    found.facts["matmul_tflops"] = matmul_rate(size, size, rows=size, seconds=seconds, bf16=GPU) / 1e12


def device_name() -> str:
    """Return the card's name, or the processor's kind."""
    return torch.cuda.get_device_name(0) if GPU else f"CPU, {platform.processor() or platform.machine()}"


@dataclass(frozen=True)
class Heads:
    """The widths of an attention layer, and the dtype it runs in."""

    queries: int
    keys: int
    width: int
    dtype: torch.dtype

    def states(self, packed: Packed) -> list[torch.Tensor]:
        """Draw queries, keys and values of a micro-batch: the same each time."""
        torch.manual_seed(1)
        shapes = [(1, count, packed.input_ids.shape[1], self.width) for count in (self.queries, self.keys, self.keys)]
        return [torch.randn(shape, device=DEVICE, dtype=self.dtype, requires_grad=True) for shape in shapes]


@dataclass(frozen=True)
class Attended:
    """One call of attention, forward and backward: its time, its memory, and output and three gradients."""

    milliseconds: float
    memory_gb: float
    tensors: list[torch.Tensor]


def attention(settings: Settings, found: Found) -> None:
    """One layer's packed attention at Llama-3-8B's widths, forward and backward, 4 pairs at once.

    `ms, new shapes` is what training has, since no two micro-batches are alike; `ms, shapes seen before` is without
    what a kernel library does for a new shape. The gap is the largest one of output and gradients to the same in fp32,
    relative to the largest value.
    """
    dtype = torch.bfloat16 if GPU else torch.float32
    heads = Heads(4, 2, 16, dtype) if settings.tiny else Heads(32, 8, 128, dtype)
    count, scale = (12, 0.05) if settings.tiny else (20, 1.0)
    rows = pairs_like_ultrafeedback(count, 100, scale=scale, seed=3)
    packs = [pack_pairs(rows[start : start + 4]) for start in range(0, count, 4)]
    found.facts["tokens_of_the_micro_batches"] = ", ".join(str(packed.input_ids.shape[1]) for packed in packs[1:])
    if GPU:
        _backends(found, packs[0], heads)
    expected = _attention_in_fp32(heads, packs[-1])
    limit = ATTENTION_GAP[DEVICE]
    for name, attend in ((AS_IT_IS, group_attention), (NO_CUDNN, group_attention), (VARLEN, varlen_attention)):
        with found.attempt("attention", name) as row, attention_as(name):
            _attend(attend, heads, packs[0])  # loads the kernels
            fresh = [_attend(attend, heads, packed) for packed in packs[1:]]
            again = [_attend(attend, heads, packed) for packed in packs[1:]]
            row["ms_fresh"] = statistics.fmean(each.milliseconds for each in fresh)
            row["ms_seen"] = statistics.fmean(each.milliseconds for each in again)
            row["memory_gb"] = max(each.memory_gb for each in again) if GPU else None
            gap = row["gap_to_fp32"] = _gap(again[-1].tensors, expected)
            found.checks[f"attention, {name}: within {limit:g} of fp32"] = gap <= limit


def _gap(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> float:
    """Return the largest gap over the largest value, of the tensor with the largest; NaN where there is one."""
    gaps = [(a.float() - b).abs().max() / b.abs().max() for a, b in zip(ours, theirs, strict=True)]
    return float(torch.stack(gaps).max())


def _attend(attend: Attention, heads: Heads, packed: Packed) -> Attended:
    states = heads.states(packed)
    held = 0
    if GPU:
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    sync()
    began = time.perf_counter()
    out = attend(None, *states, None, packed=packed.segments, scaling=heads.width**-0.5)[0]
    out.sum().backward()
    sync()
    milliseconds = (time.perf_counter() - began) * 1e3
    memory = (torch.cuda.max_memory_allocated() - held) / 1e9 if GPU else 0.0
    return Attended(milliseconds, memory, [out.detach(), *_gradients(states)])


def _gradients(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.grad for tensor in tensors if tensor.grad is not None]


def _attention_in_fp32(heads: Heads, packed: Packed) -> list[torch.Tensor]:
    """Compute the definition, scores and all, in fp32: the output and the gradients of queries, keys and values."""
    q, k, v = wide = [state.detach().float().requires_grad_() for state in heads.states(packed)]
    parts, start, repeat = [], 0, heads.queries // heads.keys
    for (prompt, rest), (_, mask) in zip(packed.spans, packed.segments.masks(None), strict=True):
        end = start + prompt + rest
        causal = torch.ones(prompt, prompt + rest, dtype=torch.bool, device=q.device).tril()
        keys, values = (states[:, :, start:end].repeat_interleave(repeat, 1) for states in (k, v))
        scores = q[:, :, start:end] @ keys.transpose(2, 3) * heads.width**-0.5
        scores = scores.masked_fill(~torch.cat([causal, mask]), float("-inf"))
        parts.append(scores.softmax(-1) @ values)
        start = end
    out = torch.cat(parts, 2).transpose(1, 2)
    out.sum().backward()
    return [out.detach(), *_gradients(wide)]


def _backends(found: Found, packed: Packed, heads: Heads) -> None:
    """Note which kernel torch picks for the two calls that `group_attention` makes for a pair."""
    names = {-1: "none", 0: "math", 1: "flash", 2: "memory-efficient", 3: "cuDNN"}
    (prompt, rest), (_, keys_of_answers) = packed.spans[0], packed.segments.masks(None)[0]
    q, k, _ = heads.states(packed)
    first, others, keys = q[:, :, :prompt], q[:, :, prompt : prompt + rest], k[:, :, : prompt + rest]
    for kind in (AS_IT_IS, NO_CUDNN):
        with found.attempt("kernels", kind) as row, attention_as(kind):
            for name, queries, mask in (
                ("prompt", first, None),
                ("answers", others, keys_of_answers),
            ):
                choice = torch._fused_sdp_choice(
                    queries, keys, keys, mask, 0.0, mask is None, scale=1.0, enable_gqa=heads.queries != heads.keys
                )
                row[name] = names.get(int(choice), str(choice))


def equality(settings: Settings, found: Found) -> None:
    """Losses and gradient norms of the paired engine against TRL's own trainer: one model, the same pairs in one order.

    Gaps are the largest of all steps, relative. The paired engine computes DPO's reference before, as the harness does
    (in bf16 in the plan's micro-batches), and TRL's trainer with each step. DPO's first loss has to be log 2 (0.6931).
    """
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        model = make_llama("tiny" if settings.tiny else "small", dtype)
        count, scale = (12, 0.04) if settings.tiny else (40, 0.4)
        rows = pairs_like_ultrafeedback(count, model.config.vocab_size, scale=scale, seed=1)
        keys = [f"train.precision={precision}", "train.batch_size=4", "train.micro_batch_size=2"]
        keys += ["method.learning_rate=2e-4", "train.gradient_checkpointing=false"]
        for arm in ("dpo", "simpo"):
            stock: Ran | None = None
            with found.attempt("TRL's own trainer", f"{arm}, {precision}") as row:
                stock = train(run_config(arm, *keys, "train.engine=stock"), rows, model)
                row.update({"steps": len(stock.loss), "loss": stock.loss, "grad_norm": stock.grad_norm})
                row["first_loss"] = stock.loss[0]
            for kind in (AS_IT_IS, VARLEN):
                name = f"{arm}, {precision}, attention {kind}"
                if kind == VARLEN and precision == "fp32" and GPU:
                    found.row("the paired engine", name, {"skipped": "flash attention has no fp32"})
                elif stock is None:
                    found.row("the paired engine", name, {"skipped": "nothing to compare with"})
                else:
                    with found.attempt("the paired engine", name) as row, attention_as(kind):
                        config = run_config(arm, *keys)
                        reference = reference_of(config, rows, model) if arm == "dpo" else None
                        ours = train(config, rows, model, reference=reference)
                        row.update(_compared(ours, stock))
                        if arm == "dpo":
                            at_log_2 = abs(ours.loss[0] - math.log(2)) <= FIRST_LOSS_GAP
                            found.checks[f"{name}: starts at log 2, within {FIRST_LOSS_GAP:g}"] = at_log_2
                        is_equal = max(row["loss_gap"], row["grad_norm_gap"]) <= STEP_GAP[precision]
                        found.checks[f"{name}: packed, within {STEP_GAP[precision]:g} of TRL's trainer"] = bool(
                            row["packed"] and is_equal
                        )
        del model
        free_memory()


def _compared(ours: Ran, stock: Ran) -> Row:
    def gap(mine: Sequence[float], theirs: Sequence[float]) -> float:
        a, b = torch.tensor(mine), torch.tensor(theirs)
        return float(((a - b).abs() / b.abs()).max())  # NaN where there is one

    return {
        "packed": ours.facts["packed"],
        "why_padded": ours.facts["why_padded"],
        "first_loss": ours.loss[0],
        "loss_gap": gap(ours.loss, stock.loss),
        "grad_norm_gap": gap(ours.grad_norm, stock.grad_norm),
        "loss": ours.loss,
        "grad_norm": ours.grad_norm,
    }


TARGET_OF_ONLINE, TARGET_OF_PRECOMPUTED, TARGET_OF_SIMPO = 1 / 3, 0.4, 0.4  # seconds a pair, TRL's trainer is 1
TARGET_SHARE, TARGET_MEMORY = 0.45, 0.7
GRID = 8  # trials of a computed grid


@dataclass(frozen=True)
class Speed:
    """A training run of the large model: its arm, its side, and what differs from the side's defaults.

    Attributes:
        keys: of TRL's config; None: the run is the harness's.
        overrides: of the harness's config.
    """

    name: str
    arm: str
    keys: dict[str, bool] | None = None
    overrides: Sequence[str] = ()

    @property
    def has_reference(self) -> bool:
        """Whether reference log-probs are handed to it: they are computed in a pass of their own, once for a grid."""
        return self.keys is None and self.arm == "dpo"


ONLINE, PRECOMPUTED, SIMPO = "TRL's DPO, online reference", "TRL's DPO, precomputed reference", "TRL's SimPO"
OUR_DPO, OUR_SIMPO, OUR_LEAN_DPO = "paired DPO", "paired SimPO", "paired DPO, gradient checkpointing"
PROFILED = "paired DPO, profiled"
RUNS = (  # in the order in which they are worth their time
    Speed(ONLINE, "dpo", {}),
    Speed(OUR_DPO, "dpo"),
    Speed(SIMPO, "simpo", {}),
    Speed(OUR_SIMPO, "simpo"),
    Speed(PRECOMPUTED, "dpo", {"precompute_ref_log_probs": True}),
    Speed(PROFILED, "dpo"),
    Speed(OUR_LEAN_DPO, "dpo", overrides=["train.gradient_checkpointing=true"]),
    Speed("TRL's DPO, no checkpointing", "dpo", {"gradient_checkpointing": False}),
)
LIGER_RUNS = (
    Speed("TRL's DPO, online reference, Liger", "dpo", {"use_liger_kernel": True}),
    Speed("TRL's SimPO, Liger", "simpo", {"use_liger_kernel": True}),
)
RATIOS = (
    (OUR_DPO, ONLINE, TARGET_OF_ONLINE),
    (OUR_DPO, PRECOMPUTED, TARGET_OF_PRECOMPUTED),
    (OUR_SIMPO, SIMPO, TARGET_OF_SIMPO),
    (OUR_DPO, "TRL's DPO, no checkpointing", None),
    (OUR_DPO, LIGER_RUNS[0].name, None),
    (OUR_SIMPO, LIGER_RUNS[1].name, None),
)


def speed(settings: Settings, found: Found) -> None:
    """A large model with random weights, LoRA in bf16: reference pass, training by both engines, generation, hashing.

    Random pairs with lengths like UltraFeedback's, micro-batches of half a step, the same pairs in each step. TRL's
    trainer has TRL's defaults. Training's seconds and memory are without the first steps and without a reference pass
    of its own, which has its own column. `of the measured rate`: the operations that are needed at least, each token
    once, in a second, over the rate of part machine. In the ratios TRL's trainer is 1, and its reference pass and the
    harness's are in the time.
    """
    began = time.perf_counter()
    model = make_llama("tiny" if settings.tiny else settings.shape, torch.bfloat16)
    with torch.no_grad():
        model.lm_head.weight.mul_(3)  # logits as wide as a trained model's
    sync()
    batch, warmup, measured = (4, 1, 1) if settings.tiny else (8, 2, settings.steps)
    scale = 0.03 if settings.tiny else 1.0
    rows = pairs_like_ultrafeedback((warmup + measured) * batch, model.config.vocab_size, scale=scale)
    found.facts |= {
        "shape": "tiny" if settings.tiny else settings.shape,
        "parameters": sum(p.numel() for p in model.parameters()),
        "made_s": time.perf_counter() - began,
        "tokens_of_a_prompt": statistics.fmean(len(row.prompt_ids) for row in rows),
        "tokens_of_an_answer": statistics.fmean(len(row.chosen_ids) + len(row.rejected_ids) for row in rows) / 2,
        "few_pairs_as_it_is": _is_slow(settings),
    }
    config = run_config("dpo", *_keys_of_steps(batch))
    reference = _reference_passes(settings, found, model, rows, config)
    with found.attempt("reference in bf16", "answers in batches of another size") as row:
        row.update(reference_noise(config, rows, model))
    pass_ms = found.tables["reference pass"].get(f"attention {VARLEN}", {}).get("ms_a_pair")
    runs = Runs(settings, found, rows, batch=batch, warmup=warmup)
    for run in RUNS:
        runs.add(run, model, reference, pass_ms)
    _ratios(found)
    _generation(settings, found, model)
    with found.attempt("hashing the weights", "seconds") as row:
        row.update(_hashing(model))
    for run in LIGER_RUNS:  # last: its kernels stay in the model
        runs.add(run, model, reference, None)
    _ratios(found)
    starts = {run.name: found.tables["training"].get(run.name, {}).get("first_loss") for run in RUNS}
    for ours, theirs in ((OUR_DPO, ONLINE), (OUR_SIMPO, SIMPO)):
        a, b = starts[ours], starts[theirs]
        if a is not None and b is not None:
            found.checks[f"speed: {ours} starts at the loss of {theirs}, within {STEP_GAP['bf16']:g}"] = bool(
                abs(a - b) <= STEP_GAP["bf16"] * abs(b)
            )
    known = [value for row in found.tables["training"].values() for key in STEPS for value in row.get(key, ())]
    found.checks["speed: every loss and gradient norm is finite"] = all(map(math.isfinite, known))
    del model
    free_memory()


def _is_slow(settings: Settings) -> bool:
    """Whether the harness's own attention takes so long for each new shape that it gets fewer pairs."""
    known = settings.before.get("attention", Found()).tables.get("attention", {}).get(AS_IT_IS, {})
    return known.get("ms_fresh", 0) > SLOW_MS


def _reference_passes(
    settings: Settings, found: Found, model: LlamaForCausalLM, rows: tuple[TokenPair, ...], config: RunConfig
) -> torch.Tensor:
    """Measure the reference pass by both attentions, in the training's micro-batches.

    Returns:
        The log-probs of all rows, from the first attention that has them.
    """
    reference: torch.Tensor | None = None
    for kind in (VARLEN, AS_IT_IS):
        asked = rows[:8] if kind == AS_IT_IS and _is_slow(settings) else rows
        with found.attempt("reference pass", f"attention {kind}") as row, attention_as(kind):
            give_back(model)  # what it knows of packing is of the other attention
            log_probs(model, rows[-2:])
            free_memory()
            sync()
            began = time.perf_counter()
            logps = reference_of(config, asked, model)
            took = time.perf_counter() - began  # the log-probs are on the CPU: nothing is left to wait for
            row.update({"ms_a_pair": took / len(asked) * 1e3, "pairs_per_s": len(asked) / took})
            row.update({"tokens_per_s": num_tokens(asked) / took, **peak_gb()})
            if reference is not None and len(logps) == len(reference):
                row["largest_gap_nats"] = float((logps - reference).abs().max())
            elif len(logps) == len(rows):
                reference = logps
    return reference_of(config, rows, model) if reference is None else reference


def _keys_of_steps(batch: int) -> list[str]:
    """Return the settings of the large model's steps: bf16, and two micro-batches each."""
    return ["train.precision=bf16", f"train.batch_size={batch}", f"train.micro_batch_size={batch // 2}"]


class Runs:
    """The training runs that fit into the time; a run is thought to take as long as the longest before it."""

    def __init__(
        self, settings: Settings, found: Found, rows: tuple[TokenPair, ...], *, batch: int, warmup: int
    ) -> None:
        self.settings, self.found, self.rows = settings, found, rows
        self.batch, self.warmup = batch, warmup
        self.longest = 0.0

    def add(self, run: Speed, model: LlamaForCausalLM, reference: torch.Tensor, pass_ms: float | None) -> None:
        """Make a run, or say why not.

        Args:
            run: what is trained.
            model: the base.
            reference: log-probs of all rows.
            pass_ms: milliseconds a pair of the harness's reference pass.
        """
        keys = run.keys or {}
        if keys.get("use_liger_kernel") and not has_liger():
            self.found.row("training", run.name, {"skipped": "liger_kernel is not installed, or there is no GPU"})
            return
        if self.settings.left - self.settings.later < self.longest:
            self.found.row("training", run.name, {"skipped": "no time left"})
            return
        began = time.perf_counter()
        with self.found.attempt("training", run.name) as row:
            if run.keys is None:
                self._ours(run, model, reference, pass_ms, row)
            else:
                ran = train_stock(run.arm, self.rows, model, batch=self.batch, warmup=self.warmup, **keys)
                self._note(ran, row, run.arm, model)
        self.longest = max(self.longest, time.perf_counter() - began)

    def _ours(
        self, run: Speed, model: LlamaForCausalLM, reference: torch.Tensor, pass_ms: float | None, row: Row
    ) -> None:
        batch, keys = self.batch, _keys_of_steps(self.batch)
        profiled = self.warmup + 1 if run.name == PROFILED else 0
        rows = self.rows[: (self.warmup + 1) * batch] if profiled else self.rows
        given = reference[: len(rows)] if run.has_reference else None
        config = run_config(run.arm, *keys, *run.overrides)
        with attention_as(VARLEN):
            ran = train(config, rows, model, reference=given, warmup=self.warmup, profiled=profiled)
        if profiled:
            for number, kernel in enumerate(ran.kernels, 1):
                title = (
                    "kernels of a paired step, longest first" if GPU else "operators of a paired step, longest first"
                )
                self.found.tables.setdefault(title, {})[f"{number}"] = kernel
            row.update(packed=ran.facts["packed"], pairs=ran.facts["pairs"])
            return
        self._note(ran, row, run.arm, model)
        if run.has_reference:
            row["reference_ms_a_pair"] = pass_ms

    def _note(self, ran: Ran, row: Row, arm: str, model: LlamaForCausalLM) -> None:
        row.update(ran.facts, first_loss=ran.loss[0], loss=ran.loss, grad_norm=ran.grad_norm)
        rate = self.settings.before.get("machine", Found()).facts.get("matmul_tflops")
        if rate:
            rank = run_config(arm).train.lora_rank
            flops = training_flops(shape_of(model), needed(ran.rows), rank=rank)
            row["share_of_the_rate"] = flops / ran.seconds / (rate * 1e12)


def _trial_ms(row: Row, trials: int = 1) -> float | None:
    """Return milliseconds a pair of a trial with its reference pass, or its share of the pass of a grid."""
    alone = row.get("ms_a_pair")
    return None if alone is None else float(alone) + float(row.get("reference_ms_a_pair") or 0.0) / trials


def _ratios(found: Found) -> None:
    """Divide seconds a pair and memory of a paired run by those of a run of TRL's trainer, and note the targets."""
    runs = found.tables["training"]
    for ours, theirs, target in RATIOS:
        a, b = runs.get(ours, {}), runs.get(theirs, {})
        mine, stock, in_a_grid = _trial_ms(a), _trial_ms(b), _trial_ms(a, GRID)
        if mine is None or stock is None or in_a_grid is None:
            continue
        name = f"{ours} / {theirs}"
        memory = a["allocated_gb"] / b["allocated_gb"] if GPU else None
        ratio: Row = {"time": mine / stock, f"time_in_a_grid_of_{GRID}_computed": in_a_grid / stock, "memory": memory}
        found.row("the paired engine against TRL's trainer", name, ratio)
        if target is not None:
            found.aim(f"{name}: seconds a pair", mine / stock, most=target)
            found.aim(f"{name}: peak memory", memory, most=TARGET_MEMORY)
    lean, online = runs.get(OUR_LEAN_DPO, {}), runs.get(ONLINE, {})
    if GPU and "allocated_gb" in lean and "allocated_gb" in online:
        name = "peak memory, both with gradient checkpointing: paired DPO / TRL's"
        found.aim(name, lean["allocated_gb"] / online["allocated_gb"], most=TARGET_MEMORY)
    for ours in (OUR_DPO, OUR_SIMPO):
        share = runs.get(ours, {}).get("share_of_the_rate")
        found.aim(f"{ours}: share of the measured rate", share, least=TARGET_SHARE)


def _generation(settings: Settings, found: Found, model: LlamaForCausalLM) -> None:
    """Measure transformers' generation: of the base and with an adapter apart, in rounds of 8 tokens and in one."""
    prompts, words, new = (4, 8, 12) if settings.tiny else (32, 29, 64)  # 29 words are 150 tokens

    def measure(policy: torch.nn.Module, name: str, round_tokens: int) -> None:
        with found.attempt("generation", name) as row:
            free_memory()
            sync()
            began = time.perf_counter()
            tokens, longest = answer(policy, prompts=prompts, words=words, new=new, round_tokens=round_tokens)
            took = time.perf_counter() - began
            row.update({"tokens_per_s": tokens / took, "ms_a_token": took / longest * 1e3, "tokens": tokens})
            row.update(peak_gb())

    answer(model, prompts=2, words=words, new=2, round_tokens=8)  # loads the kernels
    measure(model, "base, rounds of 8 tokens", 8)
    measure(model, "base, one round", new)
    with loaded_adapter(model) as policy:
        measure(policy, "adapter apart, rounds of 8 tokens", 8)
        measure(policy, "adapter apart, one round", new)


def _hashing(model: LlamaForCausalLM) -> Row:
    """What TRL's hash of all weights would cost a DPO trial, from the head's; and the check of a lent base."""
    from trl.trainer.utils import hash_module

    began = time.perf_counter()
    hash_module(model.lm_head)
    took = time.perf_counter() - began
    whole = sum(p.numel() for p in model.parameters())
    began = time.perf_counter()
    checksums(model)
    return {
        "trls_hash_s": took * whole / model.lm_head.weight.numel(),
        "check_of_the_lent_base_s": time.perf_counter() - began,
    }


def memory(settings: Settings, found: Found) -> None:
    """A trial of the whole harness that runs out of memory under a cap: it must halve its micro-batch and finish.

    It runs in a process of its own, which holds the cap; then one of the other arm, which must have the same batch
    plan. On a CPU the error is pretended.
    """
    free_memory()
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # ended where the time is over
        work = Path(tempfile.mkdtemp())
        try:
            asked = pool.apply_async(capped_trials, (work, settings.tiny, settings.cap_gb))
            rows = asked.get(max(60.0 if settings.tiny else 10.0, settings.left))
        except multiprocessing.TimeoutError:
            raise RuntimeError("no time left: the trials were stopped") from None
        finally:
            shutil.rmtree(work, ignore_errors=True)
    found.facts["cap_gb"] = settings.cap_gb if GPU else None
    for arm, row in rows.items():
        found.row("trials", arm, row)
    small, asked_for = (rows["simpo"].get(key) for key in ("micro_batch_size", "asked"))
    is_whole = all(row["status"] == "complete" for row in rows.values())
    found.checks["memory: it ran out, the micro-batch was halved, both trials are complete"] = bool(
        is_whole and small and asked_for and small < asked_for
    )
    found.checks["memory: both arms have the same batch plan"] = rows["simpo"]["plan"] == rows["dpo"]["plan"]


def capped_trials(work: Path, tiny: bool, cap_gb: float) -> dict[str, Row]:
    """Run a trial of each arm with a model of 0.2 billion weights, under a cap on the GPU's memory."""
    shape, words = ("tiny", 8) if tiny else ("mid", 150)
    keys = small_study(work, shape, words=words)
    if tiny:
        keys.append("train.threads=1")
    free_memory()
    if GPU:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap_gb * 1e9 / total))
    rows: dict[str, Row] = {}
    with contextlib.nullcontext() if GPU else pretended_out_of_memory():
        for arm in ("simpo", "dpo"):
            began = time.perf_counter()
            ran = train_once(arm, keys)
            rows[arm] = {
                "status": ran.status,
                "message": ran.message,
                "seconds": time.perf_counter() - began,
                "asked": ran.micro_batch.get("asked"),
                "micro_batch_size": ran.manifest.get("micro_batch_size"),
                "peak_gb": max(ran.manifest.get("peak_memory_bytes", {}).values(), default=0) / 1e9,
                "plan": str(ran.manifest.get("batch_plan_sha256"))[:12],
                "packed": ran.manifest.get("packed"),
            }
    return rows


SMALL_STUDY = [
    "seed=1,2",
    "train.epochs=1",
    "train.batch_size=4",
    "train.micro_batch_size=4",
    "generate.max_new_tokens=8",
]


FIVE_SEEDS = ["seed=1,2,3,4,5"]
TINY_STUDY = [*SMALL_STUDY, "data.max_train_pairs=8", "data.max_golden_prompts=4", "data.max_dev_prompts=2"]


def study(settings: Settings, found: Found) -> None:
    """The embedded study as a user runs it, `+method=simpo,dpo`: its verdict, and all trials' seconds by stage."""
    few = ["data.max_train_pairs=16", "data.max_dev_prompts=6", "data.max_golden_prompts=12"]
    small = [*SMALL_STUDY, *few] if settings.tiny else []
    _with_work(lambda work: _run_study(settings, found, work, small))


def _with_work(run: Callable[[Path], None]) -> None:
    work = Path(tempfile.mkdtemp())
    try:
        run(work)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _run_study(settings: Settings, found: Found, work: Path, more: Sequence[str]) -> None:
    keys = ["+method=simpo,dpo", "tracking=none", "study=gpu", f"results_dir={work}"]
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if settings.tiny else {})
    command = [sys.executable, "-m", "harness.sweep", *keys, *more]
    limit = max(60.0 if settings.tiny else 10.0, settings.left)
    began = time.perf_counter()
    try:
        ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit, env=environment)
    except subprocess.TimeoutExpired as error:
        done = len(list(work.glob("gpu/trials/*/manifest.json")))
        raise RuntimeError(f"no time left: stopped after {error.timeout:.0f} s, {done} trials begun") from None
    found.facts |= {"seconds": time.perf_counter() - began, "exit_status": ran.returncode}
    if ran.returncode:
        raise RuntimeError(f"the sweep ended with {ran.returncode}: {ran.stderr[-300:]}")
    manifests = [json.loads(path.read_text()) for path in sorted(work.glob("gpu/trials/*/manifest.json"))]
    found.facts["trials"] = len(manifests)
    found.facts["all_packed"] = all(manifest.get("packed") for manifest in manifests)
    spent: Row = {}
    for manifest in manifests:
        for stage, seconds in manifest["seconds"].items():
            spent[f"{stage}_s"] = spent.get(f"{stage}_s", 0.0) + seconds
    found.row("stages", "all trials", spent)
    command = [sys.executable, "-m", "harness.decide", str(work / "gpu")]
    decided = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    verdict = json.loads(decided.stdout)
    found.facts |= {key: verdict[key] for key in ("verdict", "difference", "reason")}
    found.checks["every trial of the study is complete"] = {manifest["status"] for manifest in manifests} == {
        "complete"
    }


def smollm2(settings: Settings, found: Found) -> None:
    """A real model and real pairs, `+method=simpo,dpo seed=1,2,3,4,5`: the study to its verdict.

    It stays in the folder of the results: where the time is over, the same command goes on with it.
    """
    assert settings.smollm2 is not None, "the command line asks for both folders"
    assert settings.pairs is not None
    keys = [f"model.path={settings.smollm2.resolve()}", "keep=none"]
    keys += [f"data.{split}={settings.pairs.resolve() / split}.jsonl" for split in ("train", "dev", "golden")]
    _run_study(settings, found, settings.folder / "smollm2", [*keys, *(TINY_STUDY if settings.tiny else FIVE_SEEDS)])
