"""Log-probabilities of held-out pairs under a policy and under the SFT base, for preference accuracy.

Input: a policy, the held-out pairs as token ids, and the stored log-probs of the base's own trial. Output: the rows of
pairs.jsonl.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from harness.config.arms import ARMS
from harness.config.schema import RunConfig
from harness.data.records import PairLogps
from harness.data.tokens import TokenPair
from harness.study.errors import DivergedError
from harness.study.files import FileCache, read_jsonl
from harness.train.layout import Layout

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def heldout_rows(
    config: RunConfig,
    policy: PreTrainedModel | PeftModel,
    rows: Sequence[TokenPair],
    split: str,
    *,
    base: Path,
    pad_id: int,
    files: FileCache | None = None,
    layout: Layout | None = None,
) -> list[dict[str, str | int | float]]:
    """Return the rows of pairs.jsonl for one split (`harness.data.records.PairLogps`).

    Args:
        config: the trial.
        policy: its model.
        rows: the held-out pairs.
        split: their split.
        base: folder of the SFT base's own trial, whose log-probs are the reference. The base is its own reference.
        pad_id: the tokenizer's padding.
        files: cache of this process.
        layout: of the study; None tries the shortest pair packed.

    Raises:
        DivergedError: where the trained policy's log-probs are not finite; for the base it is a ValueError.
    """
    from harness.train.logps import pair_logps

    is_trained = ARMS[config.method.name].trainer is not None
    found = pair_logps(policy, rows, pad_id=pad_id, desc=f"held-out {split}", layout=layout)
    logps: list[list[float]] = found.tolist()
    broken = sum(not all(map(math.isfinite, pair)) for pair in logps)
    if broken:
        error = DivergedError if is_trained else ValueError
        raise error(f"the log-probs of {broken} of {len(rows)} held-out {split} pairs are not finite numbers")
    reference = _stored_logps(base, split, rows, files) if is_trained else logps
    return [
        asdict(
            PairLogps(
                split=split,
                prompt_id=row.prompt_id,
                pair_id=row.pair_id,
                chosen_sum_logps=chosen,
                rejected_sum_logps=rejected,
                chosen_ref_sum_logps=chosen_ref,
                rejected_ref_sum_logps=rejected_ref,
                chosen_tokens=len(row.chosen_ids),
                rejected_tokens=len(row.rejected_ids),
            )
        )
        for row, (chosen, rejected), (chosen_ref, rejected_ref) in zip(rows, logps, reference, strict=True)
    ]


def _stored_logps(base: Path, split: str, rows: Sequence[TokenPair], files: FileCache | None) -> list[list[float]]:
    """Return the log-probs of chosen and rejected that the base's trial stored for these pairs."""
    by_pair = {(row["split"], row["pair_id"]): row for row in read_jsonl(base / "pairs.jsonl", files)}
    stored = [by_pair[split, row.pair_id] for row in rows]
    return [[row["chosen_sum_logps"], row["rejected_sum_logps"]] for row in stored]
