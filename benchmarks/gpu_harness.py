"""What the GPU check needs of the harness: pairs, models, runs.

Made for `gpu.py`. Models have random weights and are made where they run; pairs are drawn from a fixed seed.
"""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
import torch
import trl.trainer.dpo_trainer as trl_dpo
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from harness.config.schema import RunConfig
from harness.data.inputs import Inputs
from harness.data.plan import BatchPlan, ConsumedTokens, make_plan
from harness.data.records import EvalPrompt
from harness.data.tokens import TokenisedPairs, TokenPair
from harness.generate import answers as generate_module
from harness.study.files import read_json, write_jsonl
from harness.sweep.design import single_trial
from harness.sweep.problems import load_run
from harness.sweep.products import Shape, needed, shape_of, training_flops
from harness.sweep.stages import run_trial
from harness.sweep.trial import Context
from harness.train import run as train_module
from harness.train.adapter import adapter_config
from harness.train.base import reset_model, uses_bf16, weight_checksums
from harness.train.logps import StaleReferenceError, as_trained, forget_probe, pair_logps, reference_logps
from harness.train.memory import matmul_rate
from harness.train.packed import Packed, groups_of, pack

__all__ = [
    "DEVICE",
    "GPU",
    "INPUTS",
    "SHAPES",
    "Packed",
    "Ran",
    "Shape",
    "StepClock",
    "TokenPair",
    "answer",
    "checksums",
    "facts_of",
    "free_memory",
    "give_back",
    "llama_config",
    "loaded_adapter",
    "log_probs",
    "make_llama",
    "matmul_rate",
    "needed",
    "num_tokens",
    "pack",
    "pack_pairs",
    "pairs_like_ultrafeedback",
    "peak_gb",
    "pretended_out_of_memory",
    "reference_noise",
    "reference_of",
    "run_config",
    "shape_of",
    "small_study",
    "sync",
    "train",
    "train_once",
    "training_flops",
]

INPUTS = Inputs()  # of this script: the tokenizer is that of the embedded study
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"

_SHAPES = {  # hidden size, MLP's size, layers, heads, heads of keys and values, vocabulary, spread of the weights
    "8b": (4096, 14336, 32, 32, 8, 128256, 0.02),  # Llama-3-8B
    "mid": (1024, 2816, 16, 16, 4, 4096, 0.03),
    "small": (512, 1408, 4, 8, 2, 2048, 0.06),
    "tiny": (64, 160, 2, 4, 2, 512, 0.06),
}
SHAPES = tuple(_SHAPES)


def sync() -> None:
    """Wait for what the GPU has been given to do."""
    if GPU:
        torch.cuda.synchronize()


def free_memory() -> None:
    """Give memory that nothing holds back to the GPU, and begin its peak anew; on a CPU nothing is measured."""
    if GPU:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gb() -> dict[str, float | None]:
    """Return the GPU's peak since the last `free_memory`: of tensors, and of what torch held for them."""
    if not GPU:
        return {"allocated_gb": None, "reserved_gb": None}
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return {"allocated_gb": allocated / 1e9, "reserved_gb": reserved / 1e9}


def pairs_like_ultrafeedback(count: int, vocab: int, *, scale: float = 1.0, seed: int = 0) -> tuple[TokenPair, ...]:
    """Draw pairs of random ids: prompts of about 185 tokens, answers of about 320, both long-tailed, cut at 1024.

    `scale` makes all of it shorter.
    """
    draw = np.random.default_rng(seed)

    def length(mean: float, spread: float, low: int, high: int) -> int:
        median = mean / np.exp(spread**2 / 2)
        return int(np.clip(draw.lognormal(np.log(median), spread) * scale, low, high))

    def ids(size: int) -> tuple[int, ...]:
        return tuple(draw.integers(5, vocab, size).tolist())

    rows = []
    for number in range(count):
        prompt = length(185, 0.9, 8, int(600 * scale) + 8)
        room = int(1024 * scale) + 16 - prompt
        chosen, rejected = (length(320, 0.7, 4, max(5, room)) for _ in range(2))
        rows.append(TokenPair(f"p{number}", f"q{number}", ids(prompt), ids(chosen), ids(rejected)))
    return tuple(rows)


def num_tokens(rows: Sequence[TokenPair]) -> int:
    """Count the tokens of pairs, a prompt once for both answers."""
    return sum(len(row.prompt_ids) + len(row.chosen_ids) + len(row.rejected_ids) for row in rows)


def pack_pairs(rows: Sequence[TokenPair]) -> Packed:
    """Lay pairs out as one micro-batch of the paired engine, where the models are."""
    return pack(groups_of(rows, share_prefix=True)).to(DEVICE)


def llama_config(shape: str) -> LlamaConfig:
    """Return a Llama's config."""
    hidden, inner, layers, heads, kv_heads, vocab, spread = _SHAPES[shape]
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
        initializer_range=spread,
        max_position_embeddings=8192,
        rope_theta=500000.0,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def make_llama(shape: str, dtype: torch.dtype) -> LlamaForCausalLM:
    """Make a Llama with random weights on the GPU, where there is one."""
    config = llama_config(shape)
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)  # so that an 8B model is never there in fp32
    try:
        with torch.device(DEVICE):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.to(dtype).eval()


def run_config(arm: str, *overrides: str) -> RunConfig:
    """Return the config of one arm, of one epoch, that tracks nothing and saves nothing on the way."""
    return load_run([f"+method={arm}", "tracking=none", "train.epochs=1", "train.checkpoint_steps=100000", *overrides])


def log_probs(model: LlamaForCausalLM, rows: Sequence[TokenPair]) -> torch.Tensor:
    """Return the log-probs of both answers of each pair, in batches made for speed: (pairs, 2), in nats."""
    return pair_logps(model, rows, pad_id=0, desc="")


def plan_for(config: RunConfig, rows: Sequence[TokenPair]) -> BatchPlan:
    """Return the plan of one epoch over all rows."""
    batch, micro = config.train.batch_size, config.train.micro_batch_size
    assert batch is not None, "each run of this check sets it, and the micro-batch"
    assert micro is not None
    lengths = [row.length for row in rows]
    return make_plan(len(rows), epochs=1, batch_size=batch, micro_batch_size=micro, seed=0, lengths=lengths)


def reference_of(config: RunConfig, rows: Sequence[TokenPair], model: LlamaForCausalLM) -> torch.Tensor:
    """Return DPO's reference as the harness computes it: in bf16 in the plan's micro-batches, as the policy is."""
    if not uses_bf16(config):
        return log_probs(model, rows)
    plan = plan_for(config, rows)
    order, size = plan.order, plan.micro_batch_size
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    return pair_logps(model, rows, pad_id=0, desc="", batches=batches, bf16=True)


@dataclass(frozen=True)
class Ran:
    """What a training run gave.

    Attributes:
        loss: of each step.
        grad_norm: of each step.
        facts: whether it ran packed and why not, with gradient checkpointing or without, seconds to build the trainer;
            seconds, pairs and tokens a second, and memory of the measured steps.
        rows: the pairs of the measured steps.
        seconds: of the measured steps.
        kernels: of the profiled step, the longest first.
    """

    loss: list[float]
    grad_norm: list[float]
    facts: dict[str, float | int | str | bool | None]
    rows: tuple[TokenPair, ...]
    seconds: float
    kernels: list[dict[str, float | int | str]] = field(default_factory=list)


class StepClock(TrainerCallback):
    """Notes when each step ended, and begins the peak of memory anew after the warm-up.

    Args:
        warmup: steps at the start that do not count.
        profiled: number of the step, from 1, that torch's profiler looks at; 0: none.
    """

    def __init__(self, warmup: int, profiled: int = 0) -> None:
        self.warmup = warmup
        self.profiled = profiled
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if GPU else [])]
        self.profiler = profile(activities=activities) if profiled else None
        self.ends = [time.perf_counter()]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Begin anew."""
        sync()
        self.ends = [time.perf_counter()]

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Start the profiler at its step."""
        if self.profiler is not None and state.global_step + 1 == self.profiled:
            sync()
            self.profiler.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Note the time."""
        sync()
        self.ends.append(time.perf_counter())
        if self.profiler is not None and state.global_step == self.profiled:
            self.profiler.stop()
        if state.global_step == self.warmup and GPU:
            torch.cuda.reset_peak_memory_stats()

    @property
    def seconds(self) -> float:
        """Seconds of all steps after the warm-up."""
        return self.ends[-1] - self.ends[self.warmup]

    def kernels(self, most: int) -> list[dict[str, float | int | str]]:
        """Return what took the profiled step's time, the longest first: kernels on a GPU, operators on a CPU."""
        if self.profiler is None:
            return []
        name = "self_device_time_total" if GPU else "self_cpu_time_total"
        events = [
            event
            for event in self.profiler.key_averages()
            if getattr(event, name) > 0
            and (event.device_type == DeviceType.CUDA) == GPU
            and not (GPU and event.is_user_annotation)  # spans that hold kernels, such as the optimiser's step
        ]
        total = sum(getattr(event, name) for event in events)
        events.sort(key=lambda event: -getattr(event, name))
        return [
            {
                "kernel": event.key[:90],
                "calls": event.count,
                "ms": getattr(event, name) / 1e3,
                "share": getattr(event, name) / total,
            }
            for event in events[:most]
        ]


def facts_of(
    trainer: Trainer, clock: StepClock, rows: Sequence[TokenPair]
) -> dict[str, float | int | str | bool | None]:
    """Return what a run's measured steps took: the pairs of these steps, their seconds and memory."""
    return {
        "checkpointing": bool(trainer.args.gradient_checkpointing),
        "pairs": len(rows),
        "seconds": clock.seconds,
        "ms_a_pair": clock.seconds / len(rows) * 1e3,
        "pairs_per_s": len(rows) / clock.seconds,
        "tokens_per_s": num_tokens(rows) / clock.seconds,
        **peak_gb(),
    }


def train(
    config: RunConfig,
    rows: tuple[TokenPair, ...],
    model: LlamaForCausalLM,
    *,
    reference: torch.Tensor | None = None,
    warmup: int = 0,
    profiled: int = 0,
) -> Ran:
    """Train a lent model by the harness's own trainer, and give it back as it was.

    Args:
        config: the run.
        rows: the pairs, all in one epoch.
        model: the base, in which an adapter is trained.
        reference: its log-probs, shape (num_rows, 2); None: the trainer computes them, or needs none.
        warmup: steps at the start that count neither for seconds nor for memory.
        profiled: number of the step, from 1, that torch's profiler looks at; its seconds are not to be believed.
    """
    attention, folder = model.config._attn_implementation, Path(tempfile.mkdtemp())
    free_memory()
    try:
        return _train(config, rows, model, reference, StepClock(warmup, profiled), folder)
    finally:
        give_back(model)
        model.set_attn_implementation(attention)
        free_memory()
        shutil.rmtree(folder, ignore_errors=True)


def _train(
    config: RunConfig,
    rows: tuple[TokenPair, ...],
    model: LlamaForCausalLM,
    reference: torch.Tensor | None,
    clock: StepClock,
    folder: Path,
) -> Ran:
    plan = plan_for(config, rows)
    began = time.perf_counter()
    # TRL's hash of all weights takes tens of seconds of a large model; it is measured by itself.
    with patch.object(trl_dpo, "hash_module", lambda model: "not hashed"):
        trainer = train_module.build_trainer(
            config, rows, plan, model=model, chat=INPUTS.tokens(config).chat, output_dir=folder, reference=reference
        )
    built = time.perf_counter() - began
    trainer.args.save_strategy = "no"
    trainer.consumed = ConsumedTokens()
    trainer.add_callback(clock)
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    used = tuple(rows[i] for i in plan.order[clock.warmup * plan.batch_size :])
    facts = {
        "packed": bool(getattr(trainer, "packs", False)),
        "why_padded": trainer.layout.why,
        "build_s": built,
        **facts_of(trainer, clock, used),
    }
    return Ran(
        [s["loss"] for s in steps], [s["grad_norm"] for s in steps], facts, used, clock.seconds, clock.kernels(25)
    )


def give_back(model: LlamaForCausalLM) -> None:
    """Undo what trainers and PEFT do to a model, and let the next run find out anew whether it can be packed."""
    reset_model(model)
    forget_probe(model)


def checksums(model: LlamaForCausalLM) -> list[int]:
    """Return the sums by which the harness knows that a lent base is unchanged."""
    return weight_checksums(model)


@contextlib.contextmanager
def loaded_adapter(model: LlamaForCausalLM) -> Iterator[torch.nn.Module]:
    """Yield the model with a new adapter that stands apart, as a policy in bf16 answers."""
    from peft import get_peft_model

    try:
        yield get_peft_model(model, adapter_config(run_config("dpo"), model)).eval()
    finally:
        give_back(model)


def answer(policy: torch.nn.Module, *, prompts: int, words: int, new: int, round_tokens: int) -> tuple[int, int]:
    """Answer prompts of some words in one batch; `round_tokens` is after how many tokens ended answers leave it.

    Returns:
        The number of tokens of all answers, and of the longest.
    """
    config = run_config("dpo")
    decoding = replace(config.generate, max_new_tokens=new, batch_size=prompts)
    asked = [
        EvalPrompt(f"p{n}", ({"role": "user", "content": _text(n, words)},), (), None, conversational=False, row=n + 1)
        for n in range(prompts)
    ]
    with patch.object(generate_module, "ROUND_TOKENS", round_tokens):
        answers = generate_module.generate_completions(
            policy, INPUTS.tokens(config).chat, asked, split="dev", decoding=decoding
        )
    sizes = [each.tokens for each in answers]
    return sum(sizes), max(sizes)


def _text(seed: int, words: int) -> str:
    """Return words that the embedded study's tokenizer knows, others for each seed."""
    known = ["red", "blue", "green", "one", "two", "three", "four", "five", "six", "seven"]
    return " ".join(known[(seed * 7 + i * i) % len(known)] for i in range(words))


def reference_noise(config: RunConfig, rows: tuple[TokenPair, ...], model: LlamaForCausalLM) -> dict[str, float | str]:
    """Measure how log-probs in bf16 move with their batch, as a trial does, and ask for cached ones as later trials do.

    `refused` has the error's text where the cached ones are refused.
    """
    cache, plan = Path(tempfile.mkdtemp()), plan_for(config, rows)
    trained = as_trained(model, rows, plan, pad_id=0, bf16=True)
    found: dict[str, float | str] = {"mean_gap_nats": trained.noise.mean, "largest_gap_nats": trained.noise.largest}
    try:
        for _ in range(2):
            reference_logps(TokenisedPairs(rows, {}), model, base_sha256="x", pad_id=0, cache=cache, trained=trained)
        return found | {"refused": "no"}
    except StaleReferenceError as error:
        return found | {"refused": str(error).replace(str(cache), "the cache")}
    finally:
        shutil.rmtree(cache, ignore_errors=True)


def small_study(work: Path, shape: str, *, words: int) -> list[str]:
    """Write a checkpoint and pairs whose first micro-batch, of 8 pairs, is large; return a trial's overrides.

    Args:
        work: an empty folder.
        shape: of the model.
        words: of each prompt and each answer.
    """
    folder, embedded = work / "model", INPUTS.checkpoints.folder(run_config("dpo").model)
    make_llama(shape, torch.bfloat16).save_pretrained(folder)
    for path in embedded.iterdir():
        if path.name.startswith(("tokenizer", "chat_template")):
            shutil.copy(path, folder)
    train = [
        {"prompt": _text(n, words), "chosen": _text(n + 1, words), "rejected": _text(n + 2, words)} for n in range(16)
    ]
    write_jsonl(work / "train.jsonl", train)
    for split in ("dev", "golden"):
        write_jsonl(work / f"{split}.jsonl", [{"prompt": f"{split} say yes", "chosen": "yes", "rejected": "no"}])
    return [
        f"model.path={folder}",
        *(f"data.{split}={work / split}.jsonl" for split in ("train", "dev", "golden")),
        "data.max_length=8192",
        f"results_dir={work / 'results'}",
        "study=memory",
        "seed=1",
        "train.batch_size=8",
        "train.micro_batch_size=8",
        "generate.max_new_tokens=4",
    ]


@dataclass(frozen=True)
class TrialRan:
    """A whole trial.

    Attributes:
        status: `complete`, `diverged` or `failed`.
        message: why not complete.
        manifest: what the trial recorded.
        micro_batch: contents of the study's micro_batch.json; empty where memory never ran out.
    """

    status: str
    message: str
    manifest: dict[str, Any]
    micro_batch: dict[str, Any]


def train_once(arm: str, overrides: Sequence[str]) -> TrialRan:
    """Run one trial of a study, as the sweep does: train and record, without answering a prompt."""
    config = run_config(arm, *overrides)
    trial = single_trial(config, splits=())
    outcome, folder = run_trial(trial, Context()), trial.folder
    manifest, halved = folder / "manifest.json", Path(config.results_dir) / str(config.study) / "micro_batch.json"
    found = [read_json(path) if path.is_file() else {} for path in (manifest, halved)]
    return TrialRan(outcome.status, outcome.message, *found)


@contextlib.contextmanager
def pretended_out_of_memory() -> Iterator[None]:
    """Let the first training in this block run out of memory, where no GPU can."""
    real, tried = train_module.train_arm, []

    def once_too_large(*args: Any, **kwargs: Any) -> Any:
        tried.append(1)
        if len(tried) == 1:
            raise torch.OutOfMemoryError("pretended")
        return real(*args, **kwargs)

    with patch.object(train_module, "train_arm", once_too_large):
        yield
