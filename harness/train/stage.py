"""The training stage of a trial: its config and tokens -> weights in its folder, and `Trained` for the manifest.

Batch plan, reference log-probs, training in this process or in several. Where memory runs out, the study's micro-batch
is halved and training restarts (`harness.train.memory`).
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from harness.config.arms import ARMS, DPOMarginConfig, MethodConfig, SimPOConfig
from harness.config.machine import Machine, processes_problem
from harness.config.schema import (
    ALL_LINEAR,
    EMBEDDED,
    Engine,
    Kernels,
    Optimizer,
    Reference,
    RunConfig,
    Tuning,
    is_pattern,
)
from harness.data.inputs import Tokens
from harness.data.plan import BatchPlan, expected_tokens_sha256, padding_share, trained_tokens
from harness.study.errors import DivergedError, NoRoomError, UsageError
from harness.study.log import say
from harness.study.manifest import Manifest
from harness.train.base import Bases, uses_bf16, uses_tf32
from harness.train.layout import Layout
from harness.train.memory import halve, note_seed, out_of_memory_as_no_room, plan_of, smaller_than

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from harness.train.run import OnStep, TrainResult


# Noise of DPO's reference that a warning names: of the first loss over log 2; and of the loss's argument (beta times
# nats), whose scale is 1.
_LOSS_SHARE = 0.01
_LOGIT_SHARE = 0.1
# Full fine-tuning at or above this rate warns: published runs collapsed at 1e-5; the embedded model is tiny.
_COLLAPSE_RATE = {"own": 5e-6, "embedded": 1e-3}


@dataclass
class Trained:
    """Results of the stage, beside the weights.

    Attributes:
        facts: entries of the manifest.
        steps: one row per step; up to the divergence where it diverged.
        warnings: for the reader of the trial.
        peak_memory_bytes: as in `TrainResult`.
    """

    facts: Manifest
    steps: list[dict[str, float]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    peak_memory_bytes: int = 0


@dataclass(frozen=True)
class TrainStage:
    """The stage of one trial.

    Attributes:
        config: the trial.
        tokens: of its splits.
        folder: of the trial.
        base_sha256: of the base's weights.
        on_step: called after each step.
        clock: a context manager per stage's name, which measures the block.
        bases: the base cache of this process.
        machine: its devices.
        layout: how the study runs its models; None tries the shortest pair packed.
    """

    config: RunConfig
    tokens: Tokens
    folder: Path
    base_sha256: str
    on_step: OnStep
    clock: Callable[[str], AbstractContextManager[None]]
    bases: Bases
    machine: Machine
    layout: Layout | None = None

    def run(self, *, is_cost_trial: bool = False) -> Trained:
        """Train, with a smaller micro-batch where it does not fit; the checkpoints stay, for the caller to delete.

        Args:
            is_cost_trial: whether the trial is run for its cost alone: its micro-batch is not the study's.

        Raises:
            UsageError: where this machine cannot run the requested processes.
            DoesNotFitError: where not even the smallest micro-batch fits.
        """
        if problem := processes_problem(self.config.accelerate, self.machine):
            raise UsageError(problem)
        micro = None
        while True:
            plan = plan_of(self.config, self.tokens.train.rows, micro=micro)
            if not is_cost_trial:
                note_seed(self.config, plan.micro_batch_size)
            try:
                return self._train(plan)
            except NoRoomError:
                pass  # what follows runs when the error, and the model in its traceback, are gone
            self.bases.release()
            micro = self._halve(plan.micro_batch_size, is_cost_trial=is_cost_trial)

    def _train(self, plan: BatchPlan) -> Trained:
        """Train once; a divergence is a result.

        Raises:
            NoRoomError: where memory ran out.
        """
        rows = self.tokens.train.rows
        found = Trained(
            {
                "batch_plan_sha256": plan.sha256,
                "micro_batch_size": plan.micro_batch_size,
                "expected_tokens_sha256": expected_tokens_sha256(rows, plan.order),
                "padding_share": padding_share(rows, plan),
            }
        )

        def note_step(step: int, logs: dict[str, float]) -> None:
            found.steps.append({"step": step, **logs})
            self.on_step(step, logs)

        run = self._run_processes if self.config.accelerate.num_processes > 1 else self._run_here
        try:
            result = run(plan, note_step, found)
        except DivergedError as error:
            found.facts |= {"status": "diverged", "divergence": str(error)}
            return found
        found.steps, found.peak_memory_bytes = result.steps, result.peak_memory_bytes
        self._note_reference(found, plan)
        found.facts |= {**result.facts, "tokens": {"train": trained_tokens(rows, plan)}}
        if result.why_padded:
            way = {"alone": "one answer at a time, much"}.get(self.layout.way if self.layout else "", "padded,")
            found.warnings.append(f"the model is run {way} slower than packed: {result.why_padded}")
        return found

    def _run_here(self, plan: BatchPlan, on_step: OnStep, found: Trained) -> TrainResult:
        from harness.train.run import train_arm

        config = self.config
        with self.bases.borrow_base(config, trains_all=config.train.tuning is Tuning.full) as base:
            reference = self._reference(base, plan, found)
            with self.clock("train"), out_of_memory_as_no_room():
                return train_arm(
                    config,
                    self.tokens.train.rows,
                    plan,
                    model=base,
                    chat=self.tokens.chat,
                    folder=self.folder,
                    reference=reference,
                    layout=self.layout,
                    on_step=on_step,
                )

    def _run_processes(self, plan: BatchPlan, on_step: OnStep, found: Trained) -> TrainResult:
        from harness.train.processes import train_in_processes

        reference = self._reference_of_base(plan, found)
        self.bases.release()  # the processes load it again, and need the memory
        with self.clock("train"), out_of_memory_as_no_room():
            return train_in_processes(
                self.config, plan, folder=self.folder, reference=reference, layout=self.layout, on_step=on_step
            )

    def _reference_of_base(self, plan: BatchPlan, found: Trained) -> Tensor | None:
        """Return the base's log-probs; no variable of the caller keeps the base in memory."""
        if not self._needs_reference:
            return None
        with self.bases.borrow_base(self.config) as base:
            return self._reference(base, plan, found)

    def _reference(self, base: PreTrainedModel, plan: BatchPlan, found: Trained) -> Tensor | None:
        """Return the base's log-probs, shape (num_rows, 2); None where the arm or the engine does not take them.

        In bf16 and TF32 they are computed as the policy's are, and their noise is noted in `found`.
        """
        if not self._needs_reference:
            return None
        from harness.train.logps import as_trained, reference_logps
        from harness.train.run import tf32

        in_tf32 = uses_tf32(self.config)
        pairs, trained = self.tokens.train, None
        how = {
            "pad_id": self.tokens.chat.tokenizer.pad_token_id,
            "share_prefix": self.config.train.levers.share_prefix,
            "layout": self.layout,
        }
        with self.clock("reference"), tf32(on=in_tf32):
            if in_tf32 or uses_bf16(self.config):
                trained = as_trained(base, pairs.rows, plan, bf16=not in_tf32, **how)
                noise = {"mean_nats": trained.noise.mean, "largest_nats": trained.noise.largest}
                found.facts["reference_noise"] = noise
            cache = Path(self.config.results_dir) / ".cache" / "reference"
            return reference_logps(pairs, base, base_sha256=self.base_sha256, cache=cache, trained=trained, **how)

    def _note_reference(self, found: Trained, plan: BatchPlan) -> None:
        """Note how far the first loss is from log 2, which it is where policy and reference are equal; and warn."""
        method = self.config.method
        if not ARMS[method.name].uses_reference or isinstance(method, DPOMarginConfig) or not found.steps:
            return
        noise = found.facts.setdefault("reference_noise", {})
        gap = noise["first_loss_gap"] = abs(found.steps[0]["loss"] - math.log(2))
        if gap > _LOSS_SHARE * math.log(2):
            found.warnings.append(
                f"{method.name}'s first loss is {found.steps[0]['loss']:.4f} and not log 2 (0.6931): its reference is "
                f"noisy{', as in bf16; train.precision=fp32 has less noise' if uses_bf16(self.config) else ''}"
            )
        moved = getattr(method, "beta", 0.0) * noise.get("mean_nats", 0.0)
        if moved > _LOGIT_SHARE and len(plan.order) > len(self.tokens.train.rows):
            found.warnings.append(
                f"{method.name}'s reference is computed in the micro-batches of the first epoch; in those of later "
                f"ones its log-probs move by {noise['mean_nats']:.2g} nats an answer, which beta makes {moved:.2g} in "
                "the loss's scale of 1: train.epochs=1 does without it, and train.precision=fp32 has less"
            )

    @property
    def _needs_reference(self) -> bool:
        """Whether the arm needs the base's log-probs, and TRL's own engine does not compute them."""
        train = self.config.train
        is_trls = train.engine is Engine.stock or train.reference is not Reference.cached
        return ARMS[self.config.method.name].uses_reference and not is_trls

    def _halve(self, tried: int, *, is_cost_trial: bool) -> int | None:
        """Make the micro-batch smaller: the study's, or that of a trial which is run for its cost alone."""
        config = self.config
        shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
        if is_cost_trial:
            return smaller_than(config, tried)
        smaller = halve(config, tried, trial_id=self.folder.name)
        say(
            f"{config.method.name} seed {config.seed} ran out of memory with {tried} pairs at once: trials of the "
            f"study now train with {smaller}, and as many pairs per step as before"
        )
        return None


def problems(config: RunConfig) -> Iterator[str]:
    """Yield what is wrong with the sections `method`, `train` and `accelerate` in combination."""
    method, train = config.method, config.train
    yield from _batch_problems(config)
    if train.tuning is Tuning.qlora and find_spec("bitsandbytes") is None:
        yield "train.tuning=qlora: bitsandbytes is not installed; pip install 'dpo-simpo-harness[qlora]'"
    yield from _kernel_problems(config)
    yield from _target_problems(config)
    if ARMS[method.name].trainer and method.learning_rate is None:
        tuning = train.tuning.value
        yield f"method.learning_rate=null: conf/method/{method.name}.yaml has none for train.tuning={tuning}"
    if isinstance(method, SimPOConfig) and train.engine is Engine.stock and method.length_norm != 1.0:
        yield f"method.length_norm={method.length_norm:g}: TRL's own trainer has 1.0 only; use train.engine=paired"
    if train.reference is Reference.adapter_off and train.tuning is Tuning.full:
        yield "train.reference=adapter_off: train.tuning=full has no adapter; use cached or separate"
    yield from _row_problems(method)
    if isinstance(method, DPOMarginConfig) and (
        train.engine is Engine.stock or train.reference is not Reference.cached
    ):
        yield (
            f"method.gamma_beta_ratio of {method.name}: TRL's DPO has no margin; it is put into the cached reference: "
            "use train.engine=paired and train.reference=cached"
        )


def _row_problems(method: MethodConfig) -> Iterator[str]:
    """Yield the hyperparameters that make an arm another one than its row in the table of arms says."""
    arm = ARMS[method.name]
    for key, is_had, what in (
        ("gamma_beta_ratio", arm.has_margin, "margin"),
        ("length_norm", arm.per_token, "length normalisation"),
    ):
        value = getattr(method, key, 0.0)
        if value and not is_had:
            yield (
                f"method.{key}={value:g}: {method.name} is the arm without {what}, and only 0 keeps it so; for "
                f"another value take an arm with {what}"
            )


def _kernel_problems(config: RunConfig) -> Iterator[str]:
    train = config.train
    if train.optimizer is Optimizer.adamw_8bit and find_spec("bitsandbytes") is None:
        yield (
            "train.optimizer=adamw_8bit: bitsandbytes is not installed; pip install 'dpo-simpo-harness[qlora]', or use "
            "auto or adamw"
        )
    if train.kernels is Kernels.liger and find_spec("liger_kernel") is None:
        yield (
            "train.kernels=liger: liger-kernel is not installed; pip install 'dpo-simpo-harness[liger]', or use "
            "train.kernels=none"
        )
    elif train.kernels is Kernels.liger and not Machine.here().gpus:  # torch would settle which GPUs it sees
        yield "train.kernels=liger: its kernels need a GPU, and this machine has none; use train.kernels=none"


def _target_problems(config: RunConfig) -> Iterator[str]:
    """Yield what is wrong with `train.lora_targets` for every model; `harness.train.adapter` knows the names of one."""
    targets = config.train.lora_targets
    typed = f"train.lora_targets=[{','.join(targets)}]"
    if ALL_LINEAR in targets and len(targets) > 1:
        yield f"{typed}: {ALL_LINEAR} stands alone, since it has all layers; leave out the others, or it"
    for target in filter(is_pattern, targets):
        try:
            re.compile(target)
        except re.error as error:
            yield f"{typed}: {target} is neither the end of a layer's name nor a regular expression ({error})"


def _batch_problems(config: RunConfig) -> Iterator[str]:
    batch, micro = config.train.batch_size, config.train.micro_batch_size
    count, kind = config.accelerate.num_processes, config.accelerate.distributed_type
    if batch and micro and batch % micro:
        yield f"train.micro_batch_size={micro}: must divide train.batch_size={batch}"
    if (count > 1) != (kind != "NO"):
        yield (
            f"accelerate.num_processes={count} with accelerate.distributed_type={kind}: several processes need "
            "accelerate=ddp, fsdp, zero2 or zero3, and these need at least 2"
        )
    if batch and micro and batch % micro == 0 and batch % (micro * count):
        yield (
            f"accelerate.num_processes={count}: a step of train.batch_size={batch} has {batch // micro} micro-batches "
            f"of train.micro_batch_size={micro}, which {count} processes cannot share evenly; make it smaller"
        )


def setting_warnings(config: RunConfig) -> Iterator[str]:
    """Yield hyperparameters that are allowed and known to fail."""
    rate, limit = config.method.learning_rate, _COLLAPSE_RATE["embedded" if config.model.path == EMBEDDED else "own"]
    if rate is not None and config.train.tuning is Tuning.full and rate >= limit:
        yield (
            f"method.learning_rate={rate:g} with train.tuning=full: at {limit:g} and above preference optimisation is "
            f"known to collapse a model (SimPO repository, README and issue 33); published rates are 3e-7 to 1e-6"
        )
    ratio = getattr(config.method, "gamma_beta_ratio", 0.0)
    if ratio > 1.5 and ARMS[config.method.name].per_token:
        yield (
            f"method.gamma_beta_ratio={ratio:g}: published settings lie between 0 and 1; above 1.5 nats per token the "
            "loss hardly saturates"
        )
