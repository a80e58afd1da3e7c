"""TRL's trainers on pairs of token ids: what differs from TRL's own classes, and the proof of what they train on.

`ProvesConsumption` compares and hashes each micro-batch before TRL trains on it, and lets several processes share a
step. `StockDPOTrainer` and `StockCPOTrainer` are TRL's trainers on given ids. `PairedDPOTrainer` and `PairedCPOTrainer`
answer TRL's loss code from packed batches (`answer_packed_calls`). With several processes each computes its share of
every step (`harness.data.plan.share_of`), so that loss and gradient are those of one process.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import DPOConfig, DPOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.trainer.utils import FusedCausalLMOutput

from harness.data.plan import ConsumedTokens, MicroBatch
from harness.data.token_rows import TokenPair, canonical_bytes
from harness.study.errors import DivergedError
from harness.train.checkpoints import Schedule, checkpoints, seal_checkpoint
from harness.train.collator import COLLATED, PACKED, ROW, Collated, Features, PaddedRows, PairCollator, TensorComparison
from harness.train.layout import Layout
from harness.train.packed import (
    HEAD_OUTPUTS,
    HeadOutput,
    Packed,
    packed_hidden_states,
    token_logps,
)
from harness.train.pure import make_still

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PretrainedConfig, PreTrainedModel

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # CPOTrainer is in trl.experimental and warns at each use

RunPacked = Callable[..., HeadOutput]  # of a model and a packed batch, with `metrics`
Batch = dict[str, Tensor]  # TRL's tensors; in a packed batch the packed row under PACKED, too


class RowNumbers(Dataset):
    """A trainer's data set: row numbers alone.

    `CPOTrainer` maps three functions over its data set. There is nothing to prepare, and to name the result `datasets`
    would hash the third one, which holds the model.
    """

    def map(self, *_: Callable[..., Batch], **__: str | int | None) -> RowNumbers:
        """Return the row numbers as they are."""
        return self


class NoModel(torch.nn.Module):
    """Stands where `DPOTrainer` would load a reference model, until it is told that the log-probs are given.

    Args:
        config: of the policy, which TRL reads.
    """

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__()
        self.config = config


class Unread(Tensor):
    """A number that TRL's loss code asks for, and that stays on the device until the log line.

    TRL reads some ten metrics of each micro-batch one by one, and so waits for all work on the device each time.
    """

    def item(self) -> Unread:  # type: ignore[override]
        """Return the number as Python would compute with it, unread."""
        return (self.double() if self.is_floating_point() else self.long()).detach().as_subclass(Unread)

    def __bool__(self) -> bool:
        """Return True: TRL asks whether a count of tokens is above 0, and each answer has some."""
        return True

    def __getitem__(self, index: Any) -> Tensor:
        """Select by a mask without asking how many are selected: the others are 0, which leaves sums as they are."""
        if isinstance(index, Tensor) and index.dtype == torch.bool:
            return torch.where(index, self, torch.zeros((), dtype=self.dtype, device=self.device))
        return super().__getitem__(index)


Metrics = Mapping[str, list[float | Unread]]  # by name, one number of each micro-batch


@contextlib.contextmanager
def unread_metrics(accelerator: Accelerator) -> Iterator[None]:
    """Leave on the device what is gathered inside the block: TRL gathers each metric before it reads it."""
    given = {name: getattr(accelerator, name) for name in ("gather", "gather_for_metrics")}

    def gather_unread(gather: Callable[..., Tensor], *values: Tensor, **options: bool) -> Tensor:
        found = gather(*values, **options)
        return found.as_subclass(Unread) if isinstance(found, Tensor) else found

    for name, gather in given.items():
        setattr(accelerator, name, functools.partial(gather_unread, gather))
    try:
        yield
    finally:
        for name, gather in given.items():
            setattr(accelerator, name, gather)


def read_all(kept: Metrics) -> None:
    """Read what is unread in lists of metrics, in one copy from the device; the lists hold plain numbers then."""
    places = [
        (values, i, each) for values in kept.values() for i, each in enumerate(values) if isinstance(each, Unread)
    ]
    if not places:
        return
    found = torch.stack([each.as_subclass(Tensor).double() for _, _, each in places]).tolist()
    for (values, i, each), number in zip(places, found, strict=True):
        values[i] = number if each.is_floating_point() else int(number)


class ProvesConsumption(Trainer):
    """Compare each batch with the pairs that were collated, and hash them, at the moment the trainer trains on it.

    Attributes:
        consumed: the hash so far, the same in every process.
        comparison: of tensors and pairs.
        share: this process's micro-batches, where there are several processes; their rows count in the plan's order.
        layout: how the model is run.
    """

    consumed: ConsumedTokens
    comparison: TensorComparison
    share: Sequence[MicroBatch] = ()
    layout = Layout("padded")
    _micro_batch = MicroBatch(())
    _num_taken: int | None = None

    def features(self, row: TokenPair, reference: tuple[float, float] | None) -> Features:
        """Return the columns of one pair that TRL's collator pads.

        Args:
            row: the pair.
            reference: log-probs of chosen and rejected under the base, where they are given.
        """
        raise NotImplementedError

    def padded_rows(self, batch: Batch) -> list[PaddedRows]:
        """Return TRL's padded tensors, all chosen rows before all rejected ones."""
        raise NotImplementedError

    def kept_metrics(self) -> Metrics:
        """Return TRL's lists of metrics since the last log line."""
        raise NotImplementedError

    def pair_collator(self, rows: Sequence[TokenPair], reference: Tensor | None) -> PairCollator:
        """Return the collator of given pairs, padded by TRL's own collator.

        Args:
            rows: the training pairs, to which the dataset's row numbers refer.
            reference: their log-probs under the base, shape (num_rows, 2).
        """
        given = None if reference is None else reference.tolist()

        def features(number: int) -> Features:
            return self.features(rows[number], None if given is None else given[number])

        return PairCollator(rows, features, pad=self.data_collator)

    def take_share(self, share: Sequence[MicroBatch]) -> None:
        """Train on these micro-batches only, as one of several processes."""
        self.share = share
        self._gather_even = self.accelerator.gather_for_metrics
        self.accelerator.gather_for_metrics = self._gather_metrics

    def get_train_dataloader(self) -> DataLoader[Batch]:
        """Return TRL's data loader, over this process's micro-batches where there are several processes."""
        if self.args.n_gpu > 1:
            raise RuntimeError(
                f"{self.args.n_gpu} GPUs are visible to one process, which transformers would spread its batches over; "
                "make one visible (CUDA_VISIBLE_DEVICES=0), or train with accelerate=ddp"
            )
        loader = super().get_train_dataloader()
        if not self.share:
            return loader
        batches = [list(micro.rows) for micro in self.share]
        return DataLoader(loader.dataset, batch_sampler=batches, collate_fn=loader.collate_fn)

    def training_step(
        self,
        model: PreTrainedModel,
        inputs: dict[str, Tensor | Packed | Collated],
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        """Compare and hash the batch, then train on it.

        Raises:
            RuntimeError: where the tensors hold other ids than the collated pairs.
        """
        collated = inputs[COLLATED]
        assert isinstance(collated, Collated)
        batch = self._on_device(inputs)
        packed = batch.get(PACKED)
        assert packed is None or isinstance(packed, Packed)
        self.comparison.compare(collated, self.padded_rows(batch), packed)
        self._consume(collated)
        return super().training_step(model, batch, num_items_in_batch)

    def collated(self, numbers: Sequence[int]) -> Batch:
        """Return the batch of some rows, as `compute_loss` takes it."""
        return self._on_device(self.data_collator([{ROW: number} for number in numbers]))

    def _on_device(self, inputs: Mapping[str, Tensor | Packed | Collated]) -> Batch:
        batch: Batch = self._prepare_inputs({name: value for name, value in inputs.items() if name != COLLATED})
        if PACKED in batch:
            batch[PACKED] = batch[PACKED].to(self.args.device)
        return batch

    def _consume(self, collated: Collated) -> None:
        """Hash the pairs; of several processes in their order, which is the plan's."""
        pairs = [canonical_bytes(row.prompt_ids, row.chosen_ids, row.rejected_ids) for row in collated.rows]
        if self.share:
            if self._num_taken is None:  # a resumed run starts in the middle
                self._num_taken = self.state.global_step * self.args.gradient_accumulation_steps
            self._micro_batch = self.share[self._num_taken]
            self._num_taken += 1
            pairs = gather_object(pairs if self._micro_batch.weight else [])
        for pair in pairs:
            self.consumed.add(pair)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log a step: here, and nowhere else in it, numbers are read from the device."""
        self.comparison.settle()
        read_all(self.kept_metrics())
        super().log(logs, start_time)

    def compute_loss(
        self,
        model: PreTrainedModel,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, object]:
        """Return TRL's loss, weighted where the micro-batches of a step differ between processes."""
        if self.layout.still:  # again at every micro-batch: the trainer puts the model into training mode before each
            make_still(model)
        with unread_metrics(self.accelerator):
            found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not self.share:
            return found
        weight = self._micro_batch.weight
        return (found[0] * weight, *found[1:]) if return_outputs else found * weight

    def _gather_metrics(self, values: Tensor, use_gather_object: bool = False) -> Tensor:
        """Gather metrics from all processes; in a slower way where these hold different numbers of rows."""
        if self._micro_batch.is_even:
            return self._gather_even(values, use_gather_object)
        own = values.detach().reshape(-1).cpu()
        return torch.cat(gather_object([own if self._micro_batch.weight else own[:0]])).to(values.device)


class StockDPOTrainer(ProvesConsumption, DPOTrainer):
    """TRL's DPOTrainer on given token ids."""

    def _prepare_dataset(self, dataset: Dataset, *_: object) -> Dataset:
        return dataset

    def kept_metrics(self) -> Metrics:
        """Return TRL's lists."""
        kept: Metrics = self._metrics["train"]
        return kept

    def features(self, row: TokenPair, reference: tuple[float, float] | None) -> Features:
        """Return the columns of TRL's DataCollatorForPreference."""
        columns = {"prompt_ids": row.prompt_ids, "chosen_ids": row.chosen_ids, "rejected_ids": row.rejected_ids}
        if reference is None:
            return columns
        return {**columns, "ref_chosen_logps": reference[0], "ref_rejected_logps": reference[1]}

    def padded_rows(self, batch: Batch) -> list[PaddedRows]:
        """Return the one tensor in which TRL lays all rows out."""
        ids = batch["input_ids"]
        labels = ids.masked_fill(batch["completion_mask"] == 0, -100)  # as TRL's `_compute_loss` makes them
        return [PaddedRows(ids, batch["attention_mask"], labels)]


class StockCPOTrainer(ProvesConsumption, CPOTrainer):
    """TRL's CPOTrainer (for SimPO) on given token ids."""

    def kept_metrics(self) -> Metrics:
        """Return TRL's lists."""
        kept: Metrics = self._stored_metrics["train"]
        return kept

    def features(self, row: TokenPair, reference: tuple[float, float] | None) -> Features:
        """Return the columns of TRL's DPODataCollatorWithPadding; no reference is used."""
        columns: dict[str, Sequence[int]] = {}
        for side, answer in (("chosen", row.chosen_ids), ("rejected", row.rejected_ids)):
            columns[f"{side}_input_ids"] = row.prompt_ids + answer
            columns[f"{side}_attention_mask"] = [1] * (len(row.prompt_ids) + len(answer))
            columns[f"{side}_labels"] = [-100] * len(row.prompt_ids) + list(answer)
        return columns

    def padded_rows(self, batch: Batch) -> list[PaddedRows]:
        """Return TRL's tensors of the chosen rows and of the rejected ones."""
        return [
            PaddedRows(batch[f"{side}_input_ids"], batch[f"{side}_attention_mask"], batch[f"{side}_labels"])
            for side in ("chosen", "rejected")
        ]


# Metrics that need more of the head than a log-prob: computed every `metrics_steps` steps, and not logged in between.
HEAD_METRICS = ("entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy")


class RunsPacked(Trainer):
    """What the paired trainers share: a model that answers from a packed batch, where it can be run so.

    Attributes:
        packs: True where the model answers from packed batches; else TRL's own forward pass runs.
        metrics_steps: steps from one computation of `HEAD_METRICS` to the next.
    """

    packs = False
    metrics_steps = 1

    def run_packed(self, models: Sequence[PreTrainedModel], run: RunPacked, *, share_prefix: bool) -> None:
        """Collate packed rows, from which these models answer TRL's calls.

        Args:
            models: the causal LMs themselves, inside of any adapter: the policy's and the reference's.
            run: computes a packed batch's answers; all but `alone_logps` need packed attention.
            share_prefix: compute each prompt once for both answers.
        """
        self.packs = self.data_collator.packs = True
        self.data_collator.share_prefix = share_prefix
        for model in models:
            answer_packed_calls(model, run, metrics=self.wants_metrics)

    def wants_metrics(self) -> bool:
        """Return True at the steps that compute `HEAD_METRICS`."""
        return self.state.global_step % self.metrics_steps == 0


class PairedDPOTrainer(RunsPacked, StockDPOTrainer):
    """DPO with reference log-probs in the features: the base is not run during training."""

    def take_reference(self) -> None:
        """Read the reference's log-probs from the batches.

        Set after TRL's own set-up: with `precompute_ref_log_probs` that hashes all weights, in each trial.
        """
        self.ref_model, self.precompute_ref_logps = None, True

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        return dataset

    def _compute_loss(
        self, model: PreTrainedModel, inputs: Batch, return_outputs: bool
    ) -> Tensor | tuple[Tensor, object]:
        loss = super()._compute_loss(model, inputs, return_outputs)
        if self.packs and not self.wants_metrics():
            kept = self._metrics["train"]
            for name in HEAD_METRICS:
                kept[name].pop()
                if not kept[name]:
                    del kept[name]
        return loss


class PairedCPOTrainer(RunsPacked, StockCPOTrainer):
    """SimPO with the length-normalisation weight as a key: reward = log-prob / length**length_norm."""

    length_norm = 1.0

    def concatenated_forward(self, model: PreTrainedModel, batch: Batch) -> tuple[Tensor, ...]:
        """Return TRL's tuple: log-probs of chosen and rejected answers, logits for the metrics, and the SFT loss."""
        if not self.packs:
            return super().concatenated_forward(model, batch)
        padded = self.concatenated_inputs(batch, padding_value=self.pad_token_id, device=self.accelerator.device)
        labels: Tensor = padded["concatenated_labels"]
        outputs = model(
            input_ids=padded["concatenated_input_ids"],
            attention_mask=padded["concatenated_attention_mask"],
            labels=labels,
            packed=batch[PACKED],
        )
        answered = labels[:, 1:] != -100
        sums, lengths = outputs.log_probs.sum(-1), answered.sum(-1)
        half = len(labels) // 2
        logps = sums / lengths**self.length_norm
        # One mean per side: a selection by a mask would wait for the device.
        totals = torch.where(answered, outputs.mean_logits, 0.0).sum(-1).view(2, half).sum(-1)
        chosen_logits, rejected_logits = totals / lengths.view(2, half).sum(-1)
        return logps[:half], logps[half:], chosen_logits, rejected_logits, -sums[:half].sum() / lengths[:half].sum()

    def get_batch_loss_metrics(
        self, model: PreTrainedModel, batch: Batch, train_eval: str = "train"
    ) -> tuple[Tensor, dict[str, float]]:
        """Return TRL's loss and metrics, without those of the head at steps that do not compute them."""
        loss, metrics = super().get_batch_loss_metrics(model, batch, train_eval)
        if self.packs and not self.wants_metrics():
            metrics = {name: value for name, value in metrics.items() if name not in HEAD_METRICS}
        return loss, metrics

    def get_batch_logps(
        self, logits: Tensor, labels: Tensor, average_log_prob: bool = False, is_encoder_decoder: bool = False
    ) -> Tensor:
        """Return TRL's mean log-probs, or the sum over length**length_norm where that is not 1."""
        if self.length_norm == 1.0 or not average_log_prob:
            return CPOTrainer.get_batch_logps(logits, labels, average_log_prob, is_encoder_decoder)
        sums: Tensor = CPOTrainer.get_batch_logps(logits, labels, False, is_encoder_decoder)
        return sums / (labels[:, 1:] != -100).sum(-1) ** self.length_norm


def answer_packed_calls(model: PreTrainedModel, run: RunPacked, *, metrics: Callable[[], bool]) -> None:
    """Make a model answer calls with `packed=` in the layout of TRL's fused head; every other call is as before.

    Args:
        model: the causal LM itself, inside of any adapter; its attention must be `harness.train.attention.ATTENTION`,
            unless `run` is `alone_logps`.
        run: computes the answers of a packed batch.
        metrics: returns, per call, whether TRL's extra metrics are computed; else they are 0.
    """
    before = model.forward

    @functools.wraps(type(model).forward)
    def forward(*args: Tensor, packed: Packed | None = None, **kwargs: Tensor) -> FusedCausalLMOutput:
        if packed is None:
            return before(*args, **kwargs)
        return _as_padded(run(model, packed, metrics=metrics()), packed, kwargs["labels"][:, 1:] != -100)

    model.forward = forward


def logps_of_all_rows(model: PreTrainedModel, packed: Packed, *, metrics: bool) -> HeadOutput:
    """Run the head on every row, as a trainer without a completion-only head does; drop the rows beside the targets."""
    hidden = packed_hidden_states(model, packed)
    rest = torch.ones(len(hidden), dtype=torch.bool, device=hidden.device)
    rest[packed.predicting] = False
    rows = torch.cat([packed.predicting, rest.nonzero().squeeze(1)])
    targets = torch.cat([packed.targets, packed.targets.new_zeros(int(rest.sum()))])
    found = token_logps(model, hidden[rows], targets, metrics=metrics)
    count = len(packed.targets)
    return HeadOutput(found.log_probs[:count], *(None if each is None else each[:count] for each in found[1:]))


def _as_padded(found: HeadOutput, packed: Packed, mask: Tensor) -> FusedCausalLMOutput:
    """Lay values of packed answers (chosen, rejected, chosen, ...) out as TRL reads them: (2 * pairs, width - 1).

    Each place looks up its value. The backward pass of `masked_scatter` would count the mask, and wait for the device.
    """
    places = (mask.view(-1).cumsum(0) - 1).clamp(min=0)

    def lay_out(values: Tensor | None, dtype: torch.dtype) -> Tensor:
        blank = torch.zeros((), dtype=dtype, device=mask.device)
        if values is None:
            return blank.expand(mask.shape)
        answers = values.to(dtype).split(packed.lengths)
        ordered = torch.cat([*answers[::2], *answers[1::2]])
        return torch.where(mask, ordered.index_select(0, places).view(mask.shape), blank)

    dtypes = dict.fromkeys(HEAD_OUTPUTS, torch.float32) | {"is_top1": torch.bool}
    metrics = {name: lay_out(getattr(found, name), dtype).as_subclass(Unread) for name, dtype in dtypes.items()}
    return FusedCausalLMOutput(log_probs=lay_out(found.log_probs, torch.float32), label_mask=mask, **metrics)


class TrainerKind(NamedTuple):
    """A trainer's class and the class of its arguments."""

    trainer: type[StockDPOTrainer] | type[StockCPOTrainer]
    arguments: type[DPOConfig] | type[CPOConfig]


# By engine and by the name of TRL's trainer in the table of arms.
TRAINERS = {
    ("paired", "DPOTrainer"): TrainerKind(PairedDPOTrainer, DPOConfig),
    ("paired", "CPOTrainer"): TrainerKind(PairedCPOTrainer, CPOConfig),
    ("stock", "DPOTrainer"): TrainerKind(StockDPOTrainer, DPOConfig),
    ("stock", "CPOTrainer"): TrainerKind(StockCPOTrainer, CPOConfig),
}


class TrialCallback(TrainerCallback):
    """Watch a run: stop it where it diverges, save and seal checkpoints, report steps.

    Args:
        consumed: hash of what was consumed, which seals a checkpoint.
        on_step: called after each logged step.
        schedule: of the checkpoints.
    """

    def __init__(
        self, consumed: ConsumedTokens, on_step: Callable[[int, dict[str, float]], None], schedule: Schedule
    ) -> None:
        self.consumed = consumed
        self.on_step = on_step
        self.schedule = schedule

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Ask for a checkpoint where one is due by the first process's clock; at the end the weights are saved."""
        if state.global_step >= state.max_steps:
            return
        due = [self.schedule.is_due(state.global_step)]
        if torch.distributed.is_initialized():
            broadcast_object_list(due)
        control.should_save = due[0]

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: object,
    ) -> None:
        """Raise DivergedError at the first loss or gradient norm that is not finite."""
        if not logs or "loss" not in logs:
            return
        for name in ("loss", "grad_norm"):
            value = logs.get(name)
            if value is not None and not math.isfinite(value):
                raise DivergedError(f"{name} is {value} at step {state.global_step} of {state.max_steps}")
        self.on_step(state.global_step, logs)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Seal the checkpoint, then delete the older ones: at any moment there is one to resume from."""
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # each process has written its part
        if not state.is_world_process_zero:
            return
        output = Path(str(args.output_dir))
        newest = output / f"checkpoint-{state.global_step}"
        seal_checkpoint(newest, self.consumed)
        for older in checkpoints(output):  # not the trainer's own rotation, which goes by the clock
            if older != newest:
                shutil.rmtree(older, ignore_errors=True)
