"""TRL's trainers, fed with ids that the harness tokenised, in its order. The only file that knows TRL's classes.

`Stock*` change nothing but where rows come from: TRL's forward, reference pass, loss and metrics are its own.
`Paired*` also take DPO's reference log-probs from the harness's cache, and SimPO's `length_norm`.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # CPOTrainer lives in trl.experimental and says so each time

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import DPOConfig, DPOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer

from harness.consumption import PairIds, RecordsConsumption
from harness.plan import ConsumedTokens
from harness.records import DivergedError
from harness.sealing import checkpoints, seal_checkpoint


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
    """What the paired trainers share: a model that answers from a packed batch (`harness.engine`), where it can.

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
