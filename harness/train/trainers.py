"""What a trainer is given and what it really trains on: its process's share of the batch plan, and the hash of it all.

Mixed into TRL's trainers. With one process TRL's own data loader runs; with several, each process computes its share
of every step (`harness.data.plan.share_of`), so that loss and gradient are those of one process.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import DPOConfig, DPOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer

from harness.data.plan import ConsumedTokens, MicroBatch
from harness.study.errors import DivergedError
from harness.train.checkpoints import checkpoints, seal_checkpoint

PairIds = tuple[list[int], list[int], list[int]]


class RecordsConsumption:
    """Hash the ids of each batch at the moment at which the trainer trains on it.

    Attributes:
        consumed: the hash so far, the same in every process.
        share: this process's micro-batches, where there are several processes; their rows count in the plan's order.
    """

    consumed: ConsumedTokens
    share: Sequence[MicroBatch] = ()
    state: TrainerState
    args: Any
    accelerator: Any
    _now = MicroBatch(())
    _taken: int | None = None

    def take_share(self, share: Sequence[MicroBatch]) -> None:
        """Train on these micro-batches only, as one of several processes."""
        self.share = share
        self._gather_even = self.accelerator.gather_for_metrics
        self.accelerator.gather_for_metrics = self._gather

    def get_train_dataloader(self) -> Any:
        """Return TRL's data loader, with this process's micro-batches in it where there are several processes."""
        if self.args.n_gpu > 1:
            raise RuntimeError(
                f"{self.args.n_gpu} GPUs are visible to one process, which transformers would spread its batches over; "
                "make one visible (CUDA_VISIBLE_DEVICES=0), or train with accelerate=ddp"
            )
        loader = super().get_train_dataloader()  # type: ignore[misc]
        if not self.share:
            return loader
        batches = [list(micro.rows) for micro in self.share]
        return DataLoader(loader.dataset, batch_sampler=batches, collate_fn=loader.collate_fn)

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Record the batch, then train on it."""
        pairs = list(self.pairs_of(inputs))
        if self.share:
            if self._taken is None:  # a resumed run starts in the middle
                self._taken = self.state.global_step * self.args.gradient_accumulation_steps
            self._now = self.share[self._taken]
            self._taken += 1
            pairs = gather_object(
                pairs if self._now.weight else []
            )  # in the order of the processes, which is the plan's
        for pair in pairs:
            self.consumed.update(*pair)
        return super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """Return TRL's loss, weighted where the micro-batches of a step are not alike on all processes."""
        found = super().compute_loss(model, inputs, return_outputs, **kwargs)  # type: ignore[misc]
        if not self.share:
            return found
        return (found[0] * self._now.weight, *found[1:]) if return_outputs else found * self._now.weight

    def _gather(self, values: Any, *args: Any, **kwargs: Any) -> Any:
        """Gather metrics from all processes; where they hold different numbers of rows, by a slower way."""
        if self._now.is_even:
            return self._gather_even(values, *args, **kwargs)
        own = values.detach().reshape(-1).cpu()
        return torch.cat(gather_object([own if self._now.weight else own[:0]])).to(values.device)

    def pairs_of(self, inputs: dict[str, Any]) -> Iterator[PairIds]:
        """Yield the ids of each pair in a collated batch.

        Raises:
            RuntimeError: where a pair's two copies of the prompt differ.
        """
        raise NotImplementedError


os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # CPOTrainer lives in trl.experimental and says so each time


def _split(ids: torch.Tensor, attended: torch.Tensor, answer: torch.Tensor) -> tuple[list[int], list[int]]:
    """Return the ids of the prompt and of the answer in one padded row; all three of shape (width,)."""
    return ids[attended.bool() & ~answer.bool()].tolist(), ids[answer.bool()].tolist()


def _pair(chosen: tuple[list[int], list[int]], rejected: tuple[list[int], list[int]]) -> PairIds:
    """Join the two rows of a pair. Each holds a copy of the prompt, and the hash only one of them: they must agree."""
    if chosen[0] != rejected[0]:
        raise RuntimeError(
            "the trainer trains on another prompt with the rejected answer than with the chosen one: "
            f"ids {rejected[0]} and {chosen[0]}; the arms' data cannot be proved identical"
        )
    return chosen[0], chosen[1], rejected[1]


class StockDPOTrainer(RecordsConsumption, DPOTrainer):
    """TRL's DPOTrainer on rows of `prompt_ids`, `chosen_ids`, `rejected_ids`."""

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset

    def pairs_of(self, inputs: dict[str, Any]) -> Iterator[PairIds]:
        """Read the pairs from TRL's layout: all chosen rows, then all rejected ones."""
        ids, attended, answer = inputs["input_ids"], inputs["attention_mask"], inputs["completion_mask"]
        half = len(ids) // 2
        rows = [_split(*row) for row in zip(ids, attended, answer, strict=True)]
        yield from map(_pair, rows[:half], rows[half:])


class StockCPOTrainer(RecordsConsumption, CPOTrainer):
    """TRL's CPOTrainer (for SimPO) on rows of `prompt_ids`, `chosen_ids`, `rejected_ids`."""

    def tokenize_row(self, feature: dict[str, Any], model: Any = None) -> dict[str, Any]:
        """Lay given ids out as CPOTrainer's collator wants them, instead of tokenising text."""
        prompt = feature["prompt_ids"]
        row: dict[str, Any] = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
        for answer in ("chosen", "rejected"):
            completion = feature[f"{answer}_ids"]
            row[f"{answer}_input_ids"] = prompt + completion
            row[f"{answer}_attention_mask"] = [1] * (len(prompt) + len(completion))
            row[f"{answer}_labels"] = [-100] * len(prompt) + completion
        return row

    def pairs_of(self, inputs: dict[str, Any]) -> Iterator[PairIds]:
        """Read the pairs from TRL's layout: separate tensors, the prompt masked in the labels."""
        for i in range(len(inputs["chosen_input_ids"])):
            chosen, rejected = (
                _split(
                    inputs[f"{side}_input_ids"][i],
                    inputs[f"{side}_attention_mask"][i],
                    inputs[f"{side}_labels"][i] != -100,
                )
                for side in ("chosen", "rejected")
            )
            yield _pair(chosen, rejected)


# Metrics that need more of the head than a log-prob: computed every `metrics_steps` steps, and not logged in between.
HEAD_METRICS = ("entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy")


class Packs:
    """What the paired trainers share: a model that answers from a packed batch (`harness.train.packed`), where it can.

    Attributes:
        packs: True where the model runs packed; else TRL's own forward pass runs.
        why_padded: why the model cannot run packed.
        metrics_steps: steps from one computation of `HEAD_METRICS` to the next.
    """

    packs = False
    why_padded = ""
    metrics_steps = 1
    state: TrainerState

    def wants_metrics(self) -> bool:
        """Return True at the steps that compute `HEAD_METRICS`."""
        return self.state.global_step % self.metrics_steps == 0


class PairedDPOTrainer(Packs, StockDPOTrainer):
    """DPO with reference log-probs that stand in the rows: the base is not run during training."""

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        return dataset

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
        loss = super()._compute_loss(model, inputs, return_outputs)
        if self.packs and not self.wants_metrics():
            kept = self._metrics["train"]
            for name in HEAD_METRICS:
                kept[name].pop()
                if not kept[name]:
                    del kept[name]
        return loss


class PairedCPOTrainer(Packs, StockCPOTrainer):
    """SimPO with the length-normalisation weight as a key: reward = log-prob / length**length_norm."""

    length_norm = 1.0

    def concatenated_forward(self, model: Any, batch: Any) -> Any:
        """Return TRL's tuple: log-probs of chosen and rejected answers, logits for the metrics, and the SFT loss."""
        if not self.packs:
            return super().concatenated_forward(model, batch)
        padded = self.concatenated_inputs(batch, padding_value=self.pad_token_id, device=self.accelerator.device)
        labels = padded["concatenated_labels"]
        outputs = model(
            input_ids=padded["concatenated_input_ids"],
            attention_mask=padded["concatenated_attention_mask"],
            labels=labels,
            fused_lm_head=True,
        )
        answered = labels[:, 1:] != -100
        sums, lengths = outputs.log_probs.sum(-1), answered.sum(-1)
        half = len(labels) // 2
        logps = sums / lengths**self.length_norm
        logits = [outputs.mean_logits[side][answered[side]] for side in (slice(half), slice(half, None))]
        return logps[:half], logps[half:], *logits, -sums[:half].sum() / lengths[:half].sum()

    def get_batch_loss_metrics(self, model: Any, batch: Any, train_eval: Any = "train") -> Any:
        """Return TRL's loss and metrics, without those of the head at steps that do not compute them."""
        loss, metrics = super().get_batch_loss_metrics(model, batch, train_eval)
        if self.packs and not self.wants_metrics():
            metrics = {name: value for name, value in metrics.items() if name not in HEAD_METRICS}
        return loss, metrics

    def get_batch_logps(self, logits: Any, labels: Any, average_log_prob: bool = False, **kwargs: Any) -> Any:
        """Return TRL's mean log-probs, or the sum over length**length_norm where that is not 1."""
        if self.length_norm == 1.0 or not average_log_prob:
            return CPOTrainer.get_batch_logps(logits, labels, average_log_prob=average_log_prob, **kwargs)
        sums = CPOTrainer.get_batch_logps(logits, labels, average_log_prob=False, **kwargs)
        return sums / (labels[:, 1:] != -100).sum(-1) ** self.length_norm


TRAINERS: dict[tuple[str, str], tuple[type[Any], type[Any]]] = {
    ("paired", "DPOTrainer"): (PairedDPOTrainer, DPOConfig),
    ("paired", "CPOTrainer"): (PairedCPOTrainer, CPOConfig),
    ("stock", "DPOTrainer"): (StockDPOTrainer, DPOConfig),
    ("stock", "CPOTrainer"): (StockCPOTrainer, CPOConfig),
}


class TrialCallback(TrainerCallback):
    """Watch a run: stop it where it diverges, save what it consumed in each checkpoint, report each step."""

    def __init__(self, consumed: ConsumedTokens, on_step: Callable[[int, dict[str, Any]], None]) -> None:
        self.consumed = consumed
        self.on_step = on_step

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        """Raise DivergedError at the first loss or gradient norm that is not finite."""
        if not logs or "loss" not in logs:
            return
        for name in ("loss", "grad_norm"):
            value = logs.get(name)
            if value is not None and not math.isfinite(value):
                raise DivergedError(f"{name} is {value} at step {state.global_step} of {state.max_steps}")
        self.on_step(state.global_step, logs)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
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
