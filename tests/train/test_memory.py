"""Gradient checkpointing is decided by model and plan, never by the arm."""

from __future__ import annotations

from types import SimpleNamespace

import psutil
import pytest
import torch

from harness.data.plan import BatchPlan
from harness.data.tokens import TokenPair
from harness.sweep.problems import load_run
from harness.train.attention import packing
from harness.train.memory import activation_bytes, largest_micro_batch, needs_checkpointing, plan_of
from harness.train.packed import groups_of, pack, packed_logps
from tests.conftest import load_base, tokens_of

CONFIG = load_run(["+method=dpo", "data.max_train_pairs=12"])


def test_the_largest_micro_batch_by_hand() -> None:
    rows = [TokenPair("a", "a", (1, 2), (3,), (4,)), TokenPair("b", "b", (1,), (2, 3, 4), (5, 6))]
    assert largest_micro_batch(rows, BatchPlan((0, 1, 1, 0), 2, 1), share_prefix=True) == 6
    assert largest_micro_batch(rows, BatchPlan((0, 1, 1, 0), 2, 2), share_prefix=True) == 10
    assert largest_micro_batch(rows, BatchPlan((0, 1, 1, 0), 2, 2), share_prefix=False) == 13


def test_the_estimate_is_near_what_a_forward_pass_keeps() -> None:
    """Counted by what autograd saves, each tensor's memory once; weights are not activations."""
    model = load_base(CONFIG)
    rows = tokens_of(CONFIG).train.rows
    packed = pack(groups_of(rows, share_prefix=True))
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with packing(model), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        held = packed_logps(model, packed)  # alive, so that no memory is used twice
    estimate = activation_bytes(model.config, packed.input_ids.numel(), 4)
    assert held.log_probs.requires_grad
    assert 0.5 < sum(kept.values()) / estimate < 2


@pytest.mark.parametrize(("gigabytes", "needed"), [(64, False), (0.05, True)])
def test_it_is_used_only_where_memory_asks_for_it(gigabytes: float, needed: bool, monkeypatch) -> None:
    rows = [*tokens_of(CONFIG).train.rows] * 40
    config = load_run(["+method=dpo", "train.batch_size=480", "train.micro_batch_size=480", "train.epochs=1"])
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=int(gigabytes * 2**30)))
    assert needs_checkpointing(load_base(CONFIG), rows, plan_of(config, rows), share_prefix=True) is needed
