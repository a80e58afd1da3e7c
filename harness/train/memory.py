"""Memory and time of training: the micro-batch that fits, the estimate behind gradient checkpointing, and the meter.

A study trains with one micro-batch per seed: the configured one, or a smaller one once memory has run out in a trial
(`micro_batch.json`, read by `harness.study.integrity`). `Meter` measures seconds and peak memory per stage, in the
process that does the work.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from harness.config.schema import RunConfig, Tuning
from harness.data.plan import BatchPlan, make_plan
from harness.data.tokens import TokenPair
from harness.study.errors import DoesNotFitError, NoRoomError, is_out_of_memory
from harness.study.files import locked, write_json
from harness.study.integrity import MICRO_BATCH_FILE, read_micro_batch, settled

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

USABLE_SHARE = 0.6  # of the memory, for activations; the rest is for optimiser and system


def plan_of(config: RunConfig, rows: Sequence[TokenPair], *, micro: int | None = None) -> BatchPlan:
    """Return the batch plan of a config over its training rows; it does not depend on the arm and its keys.

    Args:
        config: the trial.
        rows: the training pairs.
        micro: pairs per micro-batch; None: those of the trial's study.
    """
    train = config.train
    assert train.epochs is not None, "the profile fills it, and the batch size"
    assert train.batch_size is not None
    return make_plan(
        len(rows),
        epochs=train.epochs,
        batch_size=train.batch_size,
        micro_batch_size=micro or micro_batch_size(config),
        seed=config.seed,
        lengths=[row.length for row in rows] if train.levers.group_lengths else (),
    )


def micro_batch_size(config: RunConfig) -> int:
    """Return the micro-batch of a trial's study, in pairs per process."""
    configured = config.train.micro_batch_size
    assert configured is not None, "the profile fills it"
    return min(configured, settled(config.study_folder) or configured)


def note_seed(config: RunConfig, size: int) -> None:
    """Record in a study whose micro-batch was made smaller that a trial of this seed trains with `size` pairs."""
    study = config.study_folder
    if settled(study) is None:
        return
    with locked(study):
        found = read_micro_batch(study)
        found["seeds"][str(config.seed)] = min(size, found["seeds"].get(str(config.seed), size))
        write_json(study / MICRO_BATCH_FILE, found)


def halve(config: RunConfig, tried: int, *, trial_id: str) -> int:
    """Make the study's micro-batch smaller than the one that did not fit; return it.

    Args:
        config: the trial.
        tried: the micro-batch that did not fit.
        trial_id: of the trial, which the study records.

    Raises:
        DoesNotFitError: where no micro-batch is smaller.
    """
    study = config.study_folder
    with locked(study):
        known = settled(study)
        if known is not None and known < tried:  # another trial was first
            return known
        smaller = smaller_than(config, tried)
        found = read_micro_batch(study)
        about = {"trial_id": trial_id, "arm": config.method.name, "seed": config.seed, "from": tried, "to": smaller}
        halved = [*found.get("halved", []), about]
        about_study = {"micro_batch_size": smaller, "asked": config.train.micro_batch_size}
        write_json(study / MICRO_BATCH_FILE, about_study | {"seeds": found.get("seeds", {}), "halved": halved})
    return smaller


def smaller_than(config: RunConfig, tried: int) -> int:
    """Return the next smaller micro-batch that divides the step.

    Raises:
        DoesNotFitError: where no micro-batch is smaller.
    """
    batch, processes = config.train.batch_size, config.accelerate.num_processes
    assert batch is not None, "the profile fills it"
    smaller = next((size for size in range(tried // 2, 0, -1) if batch % (size * processes) == 0), 0)
    if not smaller:
        ways = [] if config.train.gradient_checkpointing else ["train.gradient_checkpointing=true"]
        ways += ["train.tuning=lora"] if config.train.tuning is Tuning.full else ["train.tuning=qlora"]
        raise DoesNotFitError(
            f"{config.model.path} does not fit: training it on pairs of up to data.max_length="
            f"{config.data.max_length} tokens ran out of memory with train.micro_batch_size={tried}, and no "
            f"smaller one divides the step; try {', '.join(ways)}, or a smaller data.max_length"
        )
    return smaller


@contextlib.contextmanager
def out_of_memory_as_no_room() -> Iterator[None]:
    """Mark memory that runs out in training, which a smaller micro-batch may mend, apart from all other errors."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise NoRoomError(str(error)) from error


def free_unused_memory() -> None:
    """Give a GPU's memory back that nothing holds: models hold themselves in circles, which are collected first."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def free_memory() -> tuple[int, int]:
    """Return the bytes of the GPU that are free, and all of them; 0 and 0 without a GPU.

    What torch keeps of freed memory counts as free.
    """
    import torch

    if not torch.cuda.is_available():
        return 0, 0
    free, total = torch.cuda.mem_get_info()
    return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated(), total


def needs_checkpointing(
    model: PreTrainedModel, rows: Sequence[TokenPair], plan: BatchPlan, *, share_prefix: bool
) -> bool:
    """Return True where the largest micro-batch does not fit into the GPU's memory, or else the machine's."""
    import psutil
    import torch

    total = psutil.virtual_memory().total
    if model.device.type == "cuda":
        total = torch.cuda.get_device_properties(model.device).total_memory
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    tokens = largest_micro_batch(rows, plan, share_prefix=share_prefix)
    return activation_bytes(model.config, tokens, model.dtype.itemsize) > USABLE_SHARE * total - weights


def largest_micro_batch(rows: Sequence[TokenPair], plan: BatchPlan, *, share_prefix: bool) -> int:
    """Return the number of tokens of the largest micro-batch."""
    sizes = [
        (1 if share_prefix else 2) * len(row.prompt_ids) + len(row.chosen_ids) + len(row.rejected_ids) for row in rows
    ]
    step = plan.micro_batch_size
    return max(sum(sizes[i] for i in plan.order[start : start + step]) for start in range(0, len(plan.order), step))


def activation_bytes(model_config: PretrainedConfig, num_tokens: int, itemsize: int) -> int:
    """Estimate the bytes that a forward pass keeps for the backward pass of a gated-MLP transformer.

    A layer keeps about 8 tensors of the hidden size, keys and values twice, and 4 of the MLP's size, per token.

    Args:
        model_config: the model's config.
        num_tokens: tokens of the forward pass.
        itemsize: bytes per number.
    """
    text = model_config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    kept = 8 * text.hidden_size + 4 * heads * head_dim + 4 * inner
    return int(num_tokens * text.num_hidden_layers * kept * itemsize)


class Meter:
    """Seconds and peak memory per stage.

    On a CPU, memory is the peak of the process's resident set during the stage (Linux: the high-water mark is reset at
    the stage's start; elsewhere only the peak since the process's start is known). On a GPU it is the peak of torch's
    allocations.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.peak_memory_bytes: dict[str, int] = {}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure the block; a stage that is entered twice adds its seconds and keeps the larger peak."""
        reset_peak_memory()
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start
            self.peak_memory_bytes[name] = max(self.peak_memory_bytes.get(name, 0), peak_memory_bytes())


def reset_peak_memory() -> None:
    """Return freed memory to the system and reset the high-water mark."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError, AttributeError):  # not Linux, or not glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # 5: reset the peak resident set size, see proc(5)


def peak_memory_bytes() -> int:
    """Return the peak since the last reset."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class FrozenImports:
    """Excludes imported modules from garbage collection, once per set of loaded modules.

    With torch, transformers and TRL loaded, a full collection visits a million objects, for a quarter of a second. The
    first trial of a process is the SFT base, which imports neither the trainers nor their dependencies.
    """

    def __init__(self) -> None:
        self._num_modules = 0

    def freeze(self) -> None:
        """Exclude all present objects, where modules were imported since the last call."""
        if len(sys.modules) > self._num_modules:
            gc.freeze()
            self._num_modules = len(sys.modules)


def matmul_rate(inner: int, outer: int, *, rows: int = 512, seconds: float = 2.0, bf16: bool = False) -> float:
    """Measure matrix products of (rows, inner) and (inner, outer) in FLOP/s, on the GPU where there is one."""
    import torch

    is_gpu = torch.cuda.is_available()
    device, dtype = "cuda" if is_gpu else "cpu", torch.bfloat16 if bf16 else torch.float32
    a = torch.randn(rows, inner, device=device, dtype=dtype)
    b = torch.randn(inner, outer, device=device, dtype=dtype)
    for _ in range(3):
        a @ b
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        a @ b
        if is_gpu:
            torch.cuda.synchronize()
        count += 1
    return 2.0 * rows * inner * outer * count / (time.perf_counter() - start)
