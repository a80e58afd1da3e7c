"""What `plan=true` prints: the trials of a study by stage, their number and size, and what difference they can find."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from harness.config.arms import ARMS
from harness.config.footprint import Footprint, footprint, memory_problem, shape_of_folder
from harness.config.machine import Machine
from harness.config.schema import Engine, Precision, Reference, RunConfig, Tuning
from harness.config.trial_id import config_label
from harness.data.inputs import Tokens, num_steps
from harness.score.judge import PlannedAnswer
from harness.score.scorers import planned_costs
from harness.study.decision import Selection, read_selection
from harness.study.errors import UnreachableError, UsageError
from harness.study.manifest import read_manifest
from harness.study.text import one_line
from harness.sweep.chances import findable, guard_lines
from harness.sweep.design import Design, ordered
from harness.sweep.products import forward_flops, needed, shape_of_config, training_flops
from harness.sweep.trial import Trial
from harness.train.layout import Way
from harness.train.memory import USABLE_SHARE, largest_load, load_of, matmul_rate, plan_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def print_plan(design: Design, warnings: Sequence[str], machine: Machine, at_once: int = 1) -> None:
    """Print the trials of a study, their number and their size; nothing is run."""
    unknown = ""
    try:
        design.contents()
    except UnreachableError as error:
        unknown = str(error).splitlines()[0]
    print(f"study {design.study}: {_count(design)} and the SFT base")
    if unknown:
        print(f"ids and sizes are not known here: {unknown}")
    else:
        print("\n".join([*_sources(design), _size_of_a_trial(design)]))
    if not unknown:
        warnings = [*warnings, *design.inputs.tokens(design.any).warnings]  # refuses what does not fit the model
        print("\n".join(_cost(design, machine, at_once)))
    print("\n".join([findable(design), *guard_lines(design)]))
    for line in [] if unknown else [*_scoring_costs(design), *_unread_columns(design)]:
        print(line)
    print(f"{'trial':14}{'stage':9}{'arm':14}{'seed':>5}  {'state':10}config")
    if unknown:
        for stage, config, seed in _planned(design):
            print(f"{'-':14}{stage:9}{config.method.name:14}{seed:5}  {'-':10}{config_label(config)}")
    else:
        for stage, trial in _trials(design):
            state = "complete" if trial.is_complete() else "to run"
            print(f"{trial.trial_id:14}{stage:9}{trial.arm:14}{trial.seed:5}  {state:10}{trial.label}")
    for arm in design.tuned:
        for seed in design.seeds:
            print(f"{'-':14}{'confirm':9}{arm:14}{seed:5}  {'to run':10}the config that dev selects")
    for warning in warnings:
        print(f"warning: {warning}")


def _sources(design: Design) -> list[str]:
    """Say what the models of a study are, where they are not the given checkpoint itself."""
    config, checkpoints = design.any, design.inputs.checkpoints
    folder = checkpoints.folder(config.model, config.results_dir)
    made = checkpoints.made_of(folder)
    if not made:
        return []
    what = (
        f"the adapter {made['adapter']} merged into {made['base']}"
        if "adapter" in made
        else f"the language model of {made['base']}"
    )
    return [f"model: base, arms and reference are {what}: {folder}"]


def _unread_columns(design: Design) -> list[str]:
    """Return one line per file with columns that nothing reads."""
    unread = design.inputs.splits(design.any).facts.get("unread_columns", {})
    counts = {
        key: [f"{one_line(name, 40)} ({count})" for name, count in found.items()] for key, found in unread.items()
    }
    return [f"{key}: columns that nothing reads, with their rows: {', '.join(found)}" for key, found in counts.items()]


def to_run(design: Design) -> tuple[int, int]:
    """Count the trials of a design that are not complete: those that tune, and those that decide."""
    missing = [stage for stage, trial in _trials(design) if not trial.is_complete()]
    suggested = (design.any.search.trials or 0) * len(design.tuning_seeds) if design.suggests else 0
    tune = missing.count("tune") + suggested * len(design.arms)
    selected = {arm: found["selected"] for arm, found in _selection(design).get("arms", {}).items()}
    chosen = {arm: [c for c in design.arms[arm] if config_label(c) == selected.get(arm)] for arm in design.tuned}
    known = {arm: configs[0] for arm, configs in chosen.items() if configs}
    left = [trial for trial in design.deciding(known, design.seeds) if not trial.is_complete()]
    unknown = (len(design.tuned) - len(known)) * len(design.seeds)
    return tune, missing.count("confirm") + len(left) + unknown


def _selection(design: Design) -> Selection:
    try:
        return read_selection(design.study)
    except (UsageError, ValueError):  # a damaged one is for the sweep to mend or to refuse
        return {}


def _cost(design: Design, machine: Machine, at_once: int) -> Sequence[str]:
    tune, confirm = to_run(design)
    rates = machine_rates(design)
    found = estimate(design, machine, tune=tune, confirm=confirm, rates=rates, at_once=at_once)
    return lines(found, tune=tune, confirm=confirm, keep=design.any.keep)


def refuse_what_does_not_fit(design: Design, machine: Machine, at_once: int) -> None:
    """Raise a UsageError where what is missing of a study does not fit on the disk."""
    tune, confirm = to_run(design)
    found = estimate(design, machine, tune=tune, confirm=confirm, rates=None, at_once=at_once)
    may_keep_less = bool(tune) and design.any.keep == "all"
    refuse_full_disk(Path(design.any.results_dir), found.disk_bytes, may_keep_less=may_keep_less)


def _scoring_costs(design: Design) -> list[str]:
    """Return one line per configured scorer that costs money."""
    config, splits = design.any, design.inputs.splits(design.any)
    deciding = len(design.arms) * len(design.seeds)
    tuning = len(ordered(design.arms, design.tuning_seeds)) if design.tuned else 0
    golden = [PlannedAnswer(prompt.prompt, deciding) for prompt in splits.golden_prompts]
    dev = [PlannedAnswer(prompt.prompt, tuning) for prompt in splits.dev_prompts]
    return planned_costs(config.score, config.decide.metric, golden, dev, config.generate.max_new_tokens or 0)


def _trials(design: Design) -> list[tuple[str, Trial]]:
    """Return the trials that are known before anything is selected, with their stage."""
    tuned = {arm: design.arms[arm] for arm in design.tuned}
    others = {arm: configs[0] for arm, configs in design.arms.items() if arm not in tuned}
    found = [("tune", trial) for trial in design.tuning(tuned, design.tuning_seeds)]
    return found + [("confirm", trial) for trial in design.deciding(others, design.seeds)]


def _planned(design: Design) -> list[tuple[str, RunConfig, int]]:
    """Return stage, config and seed of the same trials; needs no hash of what a Hub id names."""
    tuned = {arm: design.arms[arm] for arm in design.tuned}
    others = {arm: configs[:1] for arm, configs in design.arms.items() if arm not in tuned}
    found = [("tune", config, seed) for config, seed in ordered(tuned, design.tuning_seeds)]
    return found + [("confirm", config, seed) for config, seed in ordered(others, design.seeds)]


def _count(design: Design) -> str:
    sizes = {arm: design.any.search.trials or 0 if design.suggests else len(design.arms[arm]) for arm in design.tuned}
    confirm = len(design.arms) * len(design.seeds)
    if not sizes:
        return f"{confirm} trials"
    tune = sum(sizes.values()) * len(design.tuning_seeds)
    shown = ", ".join(f"{arm} {size}" for arm, size in sizes.items())
    at_most = "at most " if design.any.search.keep < 1 or design.suggests else ""
    return (
        f"{at_most}{tune} trials to tune ({shown} configs x {len(design.tuning_seeds)} seeds, on dev), "
        f"{confirm} to confirm (1 config an arm x {len(design.seeds)} fresh seeds, on golden)"
    )


def _size_of_a_trial(design: Design) -> str:
    """Say what one trial works through, and how long those took that are finished already."""
    trial = design.any
    splits, tokens = design.inputs.splits(trial), design.inputs.tokens(trial)
    pairs = len(tokens.train.rows)
    steps = num_steps(trial, pairs)
    answers = {"dev": len(splits.dev_prompts), "golden": len(splits.golden_prompts)}
    text = f"each trial: {pairs} pairs x {trial.train.epochs} epochs = {steps} steps of {trial.train.batch_size}; "
    text += f"answers to {answers['dev']} dev and {answers['golden']} golden prompts"
    found = [read_manifest(path.parent) for path in design.study.glob("trials/*/manifest.json")]
    seconds = [sum(manifest["seconds"].values()) for manifest in found if manifest.get("status") == "complete"]
    text += f"; finished ones took {fmean(seconds):.0f} s on average" if seconds else ""
    if dropped := tokens.train.dropped:
        text += f"\ndropped training pairs: {'; '.join(f'{count}: {reason}' for reason, count in dropped.items())}"
    return text


# Seconds of the loop over those of the products that it needs. On a CPU measured (benchmarks/cost.md: 1.5 to 1.7, 2.9
# to 5). On a GPU nothing was measured: for the paired engine the aim of benchmarks/gpu.md, 45% of the rate; for TRL's
# trainers the same share of what they compute, which is twice as much for UltraFeedback's lengths.
LOOP_OVER_PRODUCTS = {Engine.paired: 1.6, Engine.stock: 4.0}
GPU_LOOP_OVER_PRODUCTS = {Engine.paired: 2.2, Engine.stock: 4.6}
_DECODING_SHARE = 0.4  # of the products' rate that a batch of answers reaches on a CPU, token by token
_GPU_ROWS = 4096  # tokens of a micro-batch; fewer rows leave a GPU idle
_STEP_SECONDS = (0.01, 0.004)  # Python's part of a micro-batch, and of each layer in it
_AROUND_SECONDS = 1.0  # loading, scoring, tracking
_LAUNCH_SECONDS = 15.0  # of `accelerate launch`: each process imports everything anew
_PROCESS_BYTES = 700 * 2**20  # Python with torch, transformers and TRL
_ANSWER_BYTES = 700  # the prompt, ids and scores of an answer, in three files; its text comes on top
_TOKEN_BYTES = 5
_STEP_BYTES = 700  # a row of train.jsonl, and of W&B's log
_RUN_BYTES = 200_000  # manifest, config, log and W&B's own files


@dataclass(frozen=True)
class Checkpoint:
    """The sizes of a base: weights in all, and inputs plus outputs of its linear layers, summed."""

    folder: Path
    parameters: int
    linear_parameters: int
    lora_sides: int


@dataclass(frozen=True)
class Rates:
    """What the device that trains was measured to do, in the precision that trains.

    Attributes:
        products: FLOP/s of matrix products as large as a micro-batch's.
        thin: FLOP/s of products as thin as a batch of answers, which reads every weight for each token.
        is_gpu: whether Python's part of a step runs beside the products.
    """

    products: float
    thin: float
    is_gpu: bool = False


@dataclass(frozen=True)
class Estimate:
    """What a study takes from now on.

    Attributes:
        tune_seconds, confirm_seconds: of one trial of the stage.
        trial_bytes: what a trial leaves on disk without its weights.
        weight_bytes: the weights that it trains.
        checkpoint_bytes: what its checkpoints need while it trains.
        memory: of each of a trial's processes while it trains.
        processes: that train a trial.
        disk_bytes: of the study, at its largest.
        reference_seconds: of all passes of DPO's reference.
    """

    tune_seconds: float
    confirm_seconds: float
    trial_bytes: int
    weight_bytes: int
    checkpoint_bytes: int
    memory: Footprint
    processes: int
    disk_bytes: int
    reference_seconds: float = 0.0

    @property
    def memory_bytes(self) -> int:
        """What all processes of a trial need together, Python included."""
        return self.processes * (self.memory.total + _PROCESS_BYTES)


def estimate(
    design: Design, machine: Machine, *, tune: int, confirm: int, rates: Rates | None, at_once: int = 1
) -> Estimate:
    """Estimate a study of so many trials by stage.

    Args:
        design: the study's plan.
        machine: where it runs.
        tune: trials that tune and are still to be run.
        confirm: trials that decide and are still to be run.
        rates: of the device that trains; None leaves the seconds at 0.
        at_once: trials that train beside each other.
    """
    if not tune + confirm:
        return Estimate(0.0, 0.0, 0, 0, 0, Footprint(), 0, 0)
    config = design.any
    splits, tokens = design.inputs.splits(config), design.inputs.tokens(config)
    folder = design.inputs.checkpoints.folder(config.model, config.results_dir)
    size = checkpoint_size(folder)
    dev, golden = len(splits.dev_prompts), len(splits.golden_prompts)
    answered = golden + (0 if design.tuned else dev)  # what a deciding trial answers
    tune_seconds = confirm_seconds = passes = 0.0
    if rates is not None:
        is_rounded = rates.is_gpu or _may_use_bf16(config, machine)
        passes = reference_passes(design, each_seed=is_rounded) * pass_seconds(config, tokens, size, rates)
        training = train_seconds(config, tokens, size, machine, rates)
        tune_seconds = training + answer_seconds(config, dev, size, rates)
        confirm_seconds = training + answer_seconds(config, answered, size, rates)
    weights, checkpoint = _weight_bytes(config, size)
    rows = len(splits.train) * (config.train.epochs or 1) // (config.train.batch_size or 1) * _STEP_BYTES
    text = _ANSWER_BYTES + _TOKEN_BYTES * (config.generate.max_new_tokens or 0)
    trial = rows + _RUN_BYTES + max(dev, answered) * text
    kept = {"all": tune + confirm, "confirmed": confirm, "none": 0}[config.keep]
    if config.generate.backend == "vllm":  # all are trained before the first one answers
        kept = max(kept, tune, confirm)
    return Estimate(
        tune_seconds=tune_seconds,
        confirm_seconds=confirm_seconds,
        trial_bytes=trial,
        weight_bytes=weights,
        checkpoint_bytes=checkpoint,
        memory=training_footprint(config, tokens, folder, machine),
        processes=config.accelerate.num_processes,
        disk_bytes=(tune + confirm + 1) * trial + kept * weights + at_once * checkpoint + 2 * (dev + golden) * text,
        reference_seconds=passes,
    )


def reference_passes(design: Design, *, each_seed: bool) -> int:
    """Count the passes of DPO's reference that are to be made: one for all trials, or one for each of their seeds.

    Args:
        design: the study's plan.
        each_seed: as in bf16 and TF32, where log-probs depend on the micro-batches, which each seed draws anew.
    """
    train = design.any.train
    if train.engine is Engine.stock or train.reference is not Reference.cached:
        return 0  # TRL's own, within the training
    trials = [trial for _, trial in _trials(design) if ARMS[trial.arm].uses_reference and not trial.is_complete()]
    seeds = {trial.seed for trial in trials}
    if any(ARMS[arm].uses_reference for arm in design.tuned):
        seeds |= set(design.seeds)  # of the configs that dev selects
    return len(seeds) if each_seed else min(1, len(seeds))


def pass_seconds(config: RunConfig, tokens: Tokens, size: Checkpoint, rates: Rates) -> float:
    """Estimate one pass of DPO's reference: the base's forward pass over the training pairs."""
    flops = forward_flops(shape_of_config(_model_config(size)), needed(tokens.train.rows))
    factors = GPU_LOOP_OVER_PRODUCTS if rates.is_gpu else LOOP_OVER_PRODUCTS
    return flops / rates.products * factors[config.train.engine]


def checkpoint_size(folder: Path) -> Checkpoint:
    """Read a checkpoint's sizes from the headers of its safetensors files."""
    parameters = linear = sides = 0
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, about in header.items():
            shape = about.get("shape", ()) if name != "__metadata__" else ()
            parameters += math.prod(shape) if shape else 0
            if len(shape) == 2 and not any(word in name for word in ("embed", "lm_head", "wte", "wpe")):
                linear += math.prod(shape)
                sides += sum(shape)
    return Checkpoint(folder, parameters, linear, sides)


def train_seconds(config: RunConfig, tokens: Tokens, size: Checkpoint, machine: Machine, rates: Rates) -> float:
    """Estimate the training of one trial: its matrix products at these rates, and Python's part of each micro-batch."""
    rows, train, processes = tokens.train.rows, config.train, config.accelerate.num_processes
    flops = training_flops(
        shape_of_config(_model_config(size)),
        needed(rows),
        rank=0 if train.tuning is Tuning.full else train.lora_rank,
        recomputed=will_checkpoint(config, tokens, size.folder, machine),
    )
    factors = GPU_LOOP_OVER_PRODUCTS if rates.is_gpu else LOOP_OVER_PRODUCTS
    products = flops * (train.epochs or 1) / processes / rates.products * factors[train.engine]
    plan = plan_of(config, rows)
    batches = len(plan.order) / plan.micro_batch_size / processes
    python = batches * (_STEP_SECONDS[0] + _STEP_SECONDS[1] * _layers(size))
    return _together(products, python, rates) + (_LAUNCH_SECONDS if processes > 1 else 0.0)


def _together(products: float, python: float, rates: Rates) -> float:
    """Return the seconds of both: one after the other on a CPU; a GPU multiplies while Python goes on."""
    return max(products, python) if rates.is_gpu else products + python


def will_checkpoint(config: RunConfig, tokens: Tokens, folder: Path, machine: Machine) -> bool:
    """Return whether training will use gradient checkpointing: as asked, or where the device is too small without."""
    asked = config.train.gradient_checkpointing
    if asked is not None:
        return asked
    whole, room = _footprint(config, tokens, folder, machine, checkpointing=False), _room(machine)
    return bool(room) and whole.beside_weights >= USABLE_SHARE * (room - whole.weights)


def answer_seconds(config: RunConfig, prompts: int, size: Checkpoint, rates: Rates) -> float:
    """Estimate the answers to so many prompts, were each as long as it may be; and what is around a trial."""
    length = config.generate.max_new_tokens or 0
    batches = -(-prompts // (config.generate.batch_size or 1))
    python = batches * length * (_STEP_SECONDS[0] + _STEP_SECONDS[1] * _layers(size)) / 2  # forward only
    return _together(2.0 * size.parameters * prompts * length / rates.thin, python, rates) + _AROUND_SECONDS


def training_footprint(config: RunConfig, tokens: Tokens, folder: Path, machine: Machine) -> Footprint:
    """Estimate the memory of a process that trains the config's micro-batches, beside Python itself."""
    checkpointing = will_checkpoint(config, tokens, folder, machine)
    return _footprint(config, tokens, folder, machine, checkpointing=checkpointing)


def _footprint(config: RunConfig, tokens: Tokens, folder: Path, machine: Machine, *, checkpointing: bool) -> Footprint:
    load = largest_load(config, tokens.train.rows, plan_of(config, tokens.train.rows), _planned_way(config))
    bf16 = _may_use_bf16(config, machine)
    return footprint(config, shape_of_folder(folder), load, bf16=bf16, checkpointing=checkpointing)


def refuse_too_little_memory(design: Design, machine: Machine) -> None:
    """Raise a UsageError where this machine cannot train a design's model with the smallest micro-batch.

    Nothing is loaded: config.json, headers and token ids say how much is needed. A finished design needs none.
    """
    try:
        if not sum(to_run(design)):
            return
    except UnreachableError:  # of a plan, which says so
        return
    config = design.any
    rows = design.inputs.tokens(config).train.rows
    shape = shape_of_folder(design.inputs.checkpoints.folder(config.model, config.results_dir))
    bf16, way = _may_use_bf16(config, machine), _planned_way(config)
    arms = [configs[0] for configs in design.arms.values() if configs] or [config]  # none where a sampler suggests them
    for trained in arms:
        load = max(load_of(trained, [row], way) for row in rows)
        room, is_gpu = _room(machine), bool(machine.gpus)
        if problem := memory_problem(trained, shape, load, bf16=bf16, room=room, is_gpu=is_gpu):
            raise UsageError(problem)


def _room(machine: Machine) -> int:
    return machine.gpu_bytes if machine.gpus else machine.memory_bytes


def _planned_way(config: RunConfig) -> Way:
    return "packed" if config.train.engine is Engine.paired and config.train.levers.share_prefix else "padded"


def _may_use_bf16(config: RunConfig, machine: Machine) -> bool:
    """Guess the arithmetic without torch: asking CUDA would settle which GPUs this process sees."""
    precision = config.train.precision
    return precision is Precision.bf16 or (precision is Precision.auto and bool(machine.gpus))


def _layers(size: Checkpoint) -> int:
    return int(_model_config(size).get_text_config().num_hidden_layers)


def _model_config(size: Checkpoint) -> PretrainedConfig:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(size.folder, trust_remote_code=False)


def _weight_bytes(config: RunConfig, size: Checkpoint) -> tuple[int, int]:
    """Return the bytes of the weights that a trial saves, and of its checkpoints while it trains.

    A checkpoint has the weights and AdamW's two states; the old one stands until the new one is written.
    """
    is_full = config.train.tuning is Tuning.full
    weights = 4 * (size.parameters if is_full else config.train.lora_rank * size.lora_sides)
    return weights, 2 * 3 * weights


def refuse_full_disk(results: Path, needed: int, *, may_keep_less: bool) -> None:
    """Raise a UsageError where a study would not fit on the disk, before it starts."""
    place = next(folder for folder in [results.resolve(), *results.resolve().parents] if folder.is_dir())
    free = shutil.disk_usage(place).free
    if needed > free:
        other = ", keep=confirmed (without the weights of trials that only tune)" if may_keep_less else ""
        raise UsageError(
            f"results_dir={results}: the study needs about {size_text(needed)} of disk, and {size_text(free)} are "
            f"free; make room, give another results_dir{other} or fewer trials"
        )


def size_text(count: float) -> str:
    """Write bytes as one reads them."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if count >= 10 or unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def time_text(seconds: float) -> str:
    """Write seconds as one reads them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def lines(found: Estimate, *, tune: int, confirm: int, keep: str) -> Sequence[str]:
    """Return what `plan=true` prints of an estimate."""
    total = tune * found.tune_seconds + confirm * found.confirm_seconds + found.reference_seconds
    stages = [("to tune", tune, found.tune_seconds), ("to confirm", confirm, found.confirm_seconds)]
    each = ", ".join(f"{time_text(seconds)} a trial {name}" for name, count, seconds in stages if count)
    each += f", {time_text(found.reference_seconds)} DPO's reference in all" if found.reference_seconds else ""
    return [
        f"time: about {time_text(total)} of trials, one after the other, on a machine like this one"
        + (f" ({each}, were all answers as long as they may be)" if each else ""),
        f"memory: about {size_text(found.memory_bytes)} for a trial that trains"
        + (f", of which each process holds {found.memory} on its device" if found.processes else ""),
        f"disk: about {size_text(found.disk_bytes)} at most: {size_text(found.weight_bytes)} of weights and "
        f"{size_text(found.trial_bytes)} of rows a trial (keep={keep}), {size_text(found.checkpoint_bytes)} of "
        "checkpoints while one trains",
    ]


def machine_rates(design: Design) -> Rates:
    """Measure how fast matrices are multiplied where training will run; on a GPU this takes about a second.

    Only `plan=true` asks: the first question settles which GPUs a process sees.
    """
    import torch

    from harness.train.base import threads, uses_bf16

    config = design.any
    text: Any = json.loads(
        (design.inputs.checkpoints.folder(config.model, config.results_dir) / "config.json").read_text()
    )
    text = text.get("text_config", text)
    inner = int(text.get("hidden_size", 1024))
    outer = int(text.get("intermediate_size") or 4 * inner)
    with threads(config):
        bf16 = uses_bf16(config)
        if not torch.cuda.is_available():
            products = matmul_rate(inner, outer, seconds=0.3, bf16=bf16)
            return Rates(products, products * _DECODING_SHARE)
        products = matmul_rate(inner, outer, rows=_GPU_ROWS, seconds=0.5, bf16=bf16)
        thin = matmul_rate(inner, outer, rows=config.generate.batch_size or 1, seconds=0.3, bf16=bf16)
        torch.cuda.empty_cache()
        return Rates(products, thin, is_gpu=True)
