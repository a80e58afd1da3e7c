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

from harness.config.arms import ARMS
from harness.config.footprint import Load, ModelShape, footprint, shape_of
from harness.config.schema import RunConfig, Tuning
from harness.data.plan import BatchPlan, make_plan
from harness.data.token_rows import TokenPair, pair_lengths
from harness.study.errors import DoesNotFitError, NoRoomError, is_out_of_memory
from harness.study.files import locked, write_json
from harness.study.integrity import MICRO_BATCH_FILE, read_micro_batch, settled
from harness.train.layout import Way

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

USABLE_SHARE = 0.85  # of the free memory; the rest is lost between its blocks, and for what the system does meanwhile


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
        lengths=pair_lengths(rows).tolist() if train.levers.group_lengths else (),
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
    """Give a GPU's memory back that nothing holds: models hold themselves in circles, which are collected first.

    What was frozen with a library's import (`FrozenImports`) is looked through, too: a model may be among it.
    """
    is_frozen = gc.get_freeze_count() > 0
    gc.unfreeze()
    gc.collect()
    if is_frozen:
        gc.freeze()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def free_memory(device: torch.device | None = None) -> tuple[int, int]:
    """Return the bytes that are free, and all of them: of a GPU, or of the machine for another device.

    What torch keeps of freed memory counts as free.

    Args:
        device: None is the GPU of this process; without one, 0 and 0 are returned.
    """
    import psutil
    import torch

    if device is not None and device.type != "cuda":
        memory = psutil.virtual_memory()
        return int(memory.available), int(memory.total)
    if not torch.cuda.is_available():
        return 0, 0
    free, total = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device), total


def needs_checkpointing(
    config: RunConfig, model: PreTrainedModel, rows: Sequence[TokenPair], plan: BatchPlan, *, way: Way, bf16: bool
) -> bool:
    """Return True where the largest micro-batch does not fit into the memory that is free, beside the loaded model.

    Of several processes each one has a GPU of its own, or its part of the machine, with the weights in it.

    Args:
        config: the trial.
        model: the base, loaded and without an adapter.
        rows: the training pairs.
        plan: their micro-batches.
        way: how the model is run on them.
        bf16: whether matrix products run in bf16.
    """
    load = largest_load(config, rows, plan, way)
    needed = footprint(config, model_shape(model), load, bf16=bf16, checkpointing=False)
    processes = config.accelerate.num_processes
    if processes == 1:
        if model.device.type == "cuda":
            free_unused_memory()  # such as the copy of the base on which the preconditions were proved
        return needed.beside_weights > USABLE_SHARE * free_memory(model.device)[0]
    # Processes that share a step must decide alike, by what is not theirs alone; weights may not be on their GPUs yet.
    room = free_memory()[1] or free_memory(model.device)[1] // processes
    return needed.total > USABLE_SHARE * room


def model_shape(model: PreTrainedModel) -> ModelShape:
    """Return the shape of a model in memory, whose matrices may be packed in 4 bits."""
    import torch

    tensors = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and f"{name}.weight" in tensors:
            tensors[f"{name}.weight"] = (module.out_features, module.in_features)
    return shape_of(model.config.to_dict(), tensors)


def largest_load(config: RunConfig, rows: Sequence[TokenPair], plan: BatchPlan, way: Way) -> Load:
    """Return the load of the plan's largest micro-batch."""
    step = plan.micro_batch_size
    batches = (plan.order[start : start + step] for start in range(0, len(plan.order), step))
    return max(load_of(config, [rows[i] for i in batch], way) for batch in batches)


def load_of(config: RunConfig, rows: Sequence[TokenPair], way: Way) -> Load:
    """Return what one micro-batch makes the model compute.

    Args:
        config: the trial.
        rows: the pairs of the micro-batch.
        way: how the model is run: packed in one row, padded to the longest answer, or one answer at a time.
    """
    answers = sum(len(row.chosen_ids) + len(row.rejected_ids) for row in rows)
    prompts = sum(len(row.prompt_ids) for row in rows)
    if way == "packed":
        return Load((1 if config.train.levers.share_prefix else 2) * prompts + answers, answers)
    if way == "alone":
        return Load(2 * prompts + answers, 2 * prompts + answers, all_logits=True)
    positions = 2 * len(rows) * max(row.length for row in rows)
    holds_all = ARMS[config.method.name].trainer == "CPOTrainer"  # TRL's DPOTrainer has a head that does not
    return Load(positions, positions if holds_all else answers, holds_all)


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
        _wait_for_gpu()
        start = time.perf_counter()
        try:
            yield
        finally:
            _wait_for_gpu()
            self.seconds[name] += time.perf_counter() - start
            self.peak_memory_bytes[name] = max(self.peak_memory_bytes.get(name, 0), peak_memory_bytes())


def _wait_for_gpu() -> None:
    """Let a GPU end what it was given, so that a stage's seconds are its own; asks CUDA nothing where it is unused."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        with contextlib.suppress(RuntimeError):  # of a kernel that failed: the stage's own error says more
            torch.cuda.synchronize()


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
    at_once = 10 if is_gpu else 1  # a wait after each product would leave a GPU idle in between
    _wait_for_gpu()
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        for _ in range(at_once):
            a @ b
        _wait_for_gpu()
        count += at_once
    return 2.0 * rows * inner * outer * count / (time.perf_counter() - start)
