"""What reaches the model is what was collated: any other row or token between collator and model stops the trial."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.config.schema import Engine, RunConfig
from harness.data.plan import ConsumedTokens
from harness.sweep.problems import load_run
from harness.train.collator import COLLATED, PACKED, Collated, PairCollator, TensorComparison, checksum
from harness.train.memory import plan_of
from harness.train.packed import groups_of, pack
from harness.train.run import build_trainer, train_arm
from tests.conftest import load_base, tokens_of, training_overrides

Batch = dict[str, Any]
ENGINES = [(arm, engine) for arm in ("dpo", "simpo") for engine in Engine]
REFUSED = (
    r"the trainer got other token ids than the collator laid out for the pairs \S+, \S+: the arms' data cannot be "
)


def configure(arm: str, engine: Engine) -> RunConfig:
    return load_run(training_overrides(f"+method={arm}", "data.max_train_pairs=16", f"train.engine={engine.value}"))


def parts_of(config: RunConfig) -> dict[str, Any]:
    rows = tokens_of(config).train.rows
    is_given = config.method.name == "dpo" and config.train.engine is Engine.paired
    reference = torch.zeros(len(rows), 2) if is_given else None
    return {"model": load_base(config), "chat": tokens_of(config).chat, "reference": reference}


def trainer_of(config: RunConfig, folder: Path) -> Any:
    rows = tokens_of(config).train.rows
    trainer = build_trainer(config, rows, plan_of(config, rows), output_dir=folder, **parts_of(config))
    trainer.consumed = ConsumedTokens()
    return trainer


def padded_ids(batch: Batch) -> str:
    return "input_ids" if "input_ids" in batch else "rejected_input_ids"


def swap_padded_rows(batch: Batch) -> None:
    for value in batch.values():
        if isinstance(value, torch.Tensor) and value.ndim == 2:
            value[:2] = value[:2].flip(0)


def swap_packed_rows(batch: Batch) -> None:
    batch[PACKED] = pack(batch[COLLATED].groups[::-1])


def change_a_padded_token(batch: Batch) -> None:
    batch[padded_ids(batch)][1, 2] += 1


def mask_a_token(batch: Batch) -> None:
    batch[padded_ids(batch).replace("input_ids", "attention_mask")][0, 0] = 0


def change_a_label(batch: Batch) -> None:
    if "completion_mask" in batch:
        batch["completion_mask"][0, 0] = 1
    else:
        batch["chosen_labels"][0, 0] = batch["chosen_input_ids"][0, 0]


def change_a_packed_token(batch: Batch) -> None:
    batch[PACKED].input_ids[0, 2] += 1


def change_a_packed_target(batch: Batch) -> None:
    batch[PACKED].targets[-1] += 1


def swap_two_answers_in_the_packed_row(batch: Batch) -> None:
    """The same tokens in another order, and all that belongs to it: a packed row of other pairs than the padded one."""
    rows = batch[COLLATED].rows
    batch[PACKED] = pack(
        groups_of([replace(r, chosen_ids=r.rejected_ids, rejected_ids=r.chosen_ids) for r in rows], share_prefix=True)
    )


def move_a_position(batch: Batch) -> None:
    batch[PACKED].position_ids[0, -1] += 1


def predict_from_other_rows(batch: Batch) -> None:
    predicting = batch[PACKED].predicting
    predicting[[0, -1]] = predicting[[-1, 0]]


def drop_the_packed_row(batch: Batch) -> None:
    del batch[PACKED]


STOCK: list[Callable[[Batch], None]] = [swap_padded_rows, change_a_padded_token, mask_a_token, change_a_label]
PAIRED = [
    *STOCK,
    swap_packed_rows,
    change_a_packed_token,
    change_a_packed_target,
    drop_the_packed_row,
    swap_two_answers_in_the_packed_row,
    move_a_position,
    predict_from_other_rows,
]


@pytest.mark.parametrize(("arm", "engine"), ENGINES)
def test_each_disturbance_of_a_batch_is_refused_at_once_and_by_checksum(
    arm: str, engine: Engine, tmp_path: Path
) -> None:
    trainer = trainer_of(configure(arm, engine), tmp_path)
    loader = trainer.get_train_dataloader()
    for disturb in PAIRED if engine is Engine.paired else STOCK:
        batch = next(iter(loader))
        by_checksum = TensorComparison(at_once=False)
        by_checksum.compare(batch[COLLATED], trainer.padded_rows(batch), batch.get(PACKED))
        by_checksum.settle()
        disturb(batch)
        with pytest.raises(RuntimeError, match=REFUSED):
            trainer.training_step(trainer.model, batch)
        by_checksum.compare(batch[COLLATED], trainer.padded_rows(batch), batch.get(PACKED))
        with pytest.raises(RuntimeError, match=REFUSED):
            by_checksum.settle()
        by_checksum.settle()  # nothing is pending
    assert trainer.consumed.num_pairs == 0, "what was refused was not consumed"


@pytest.mark.parametrize("disturb", [swap_padded_rows, change_a_padded_token])
@pytest.mark.parametrize(("arm", "engine"), ENGINES)
def test_a_trial_is_refused_in_whose_third_batch_rows_are_swapped_or_a_token_is_changed(
    arm: str, engine: Engine, disturb: Callable[[Batch], None], tmp_path: Path, monkeypatch
) -> None:
    config, batches = configure(arm, engine), 0
    real = PairCollator.__call__

    def collate(self: PairCollator, examples: Any) -> Batch:
        nonlocal batches
        batches += 1
        batch = real(self, examples)
        if batches == 3:
            disturb(batch)
        return batch

    monkeypatch.setattr(PairCollator, "__call__", collate)
    rows = tokens_of(config).train.rows
    with pytest.raises(RuntimeError, match=REFUSED):
        train_arm(config, rows, plan_of(config, rows), folder=tmp_path, **parts_of(config))
    assert not (tmp_path / "adapter").exists()


def test_a_checksum_is_read_at_the_log_line(tmp_path: Path) -> None:
    """As on a GPU: the step that is not what was collated is never logged."""
    trainer = trainer_of(configure("simpo", Engine.paired), tmp_path)
    trainer.comparison = TensorComparison(at_once=False)
    collate = trainer.data_collator

    def disturbed(examples: Any) -> Batch:
        batch = collate(examples)
        if trainer.state.global_step == 2:
            change_a_packed_token(batch)
        return batch

    trainer.data_collator = disturbed
    with pytest.raises(RuntimeError, match=REFUSED):
        trainer.train()
    assert [entry["step"] for entry in trainer.state.log_history] == [1, 2]


def test_the_checksum_depends_on_each_number_and_on_its_place_alone() -> None:
    torch.manual_seed(0)
    codes = torch.randint(1, 2**50, (60,))
    everything = torch.ones(60, dtype=torch.bool)
    whole = checksum(codes, everything)
    padded = torch.full((100,), 7)
    places = torch.zeros(100, dtype=torch.bool)
    places[torch.randperm(100)[:60]] = True
    padded[places] = codes
    assert checksum(padded, places) == whole, "where padding stands does not matter"
    for i in range(60):
        other = codes.clone()
        other[i] += 1
        assert checksum(other, everything) != whole
        other = codes.clone()
        other[[i, (i + 1) % 60]] = codes[[(i + 1) % 60, i]]
        assert checksum(other, everything) != whole


def test_a_batch_holds_the_pairs_of_its_row_numbers_and_a_reference_per_pair() -> None:
    rows = tokens_of(configure("dpo", Engine.paired)).train.rows

    def features(number: int) -> dict[str, float]:
        return {"number": number}

    def pad(columns: list[Any]) -> Batch:
        return {"numbers": torch.tensor([each["number"] for each in columns])}

    batch = PairCollator(rows, features, pad)([{"row": 3}, {"row": 1}])
    assert batch["numbers"].tolist() == [3, 1]
    assert batch[COLLATED] == Collated((rows[3], rows[1]))
    assert PACKED not in batch
    packed = PairCollator(rows, features, pad, packs=True, share_prefix=False)([{"row": 3}, {"row": 1}])[PACKED]
    assert packed.targets.tolist() == [
        *rows[3].chosen_ids, *rows[3].rejected_ids, *rows[1].chosen_ids, *rows[1].rejected_ids
    ]  # fmt: skip
    assert len(packed.spans) == 4
    assert replace(packed) == packed.to("cpu")
