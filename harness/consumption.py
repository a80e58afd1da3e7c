"""What a trainer is given and what it really trains on: its process's share of the batch plan, and the hash of it all.

Mixed into TRL's trainers. With one process TRL's own data loader runs; with several, each process computes its share
of every step (`harness.plan.share_of`), so that loss and gradient are those of one process.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from transformers import TrainerState

from harness.plan import ConsumedTokens, MicroBatch

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
