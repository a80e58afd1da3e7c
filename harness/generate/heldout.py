"""Log-probabilities of held-out pairs under a policy and under the SFT base, for preference accuracy."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from harness.config.arms import ARMS
from harness.config.schema import RunConfig
from harness.data.records import PairLogps
from harness.data.tokens import TokenPair
from harness.study.errors import DivergedError
from harness.study.files import read_jsonl


def heldout_rows(
    config: RunConfig, policy: Any, rows: tuple[TokenPair, ...], split: str, *, base: Path
) -> list[dict[str, Any]]:
    """Return the rows of pairs.jsonl for one split (`harness.data.records.PairLogps`).

    Args:
        config: the trial.
        policy: its model.
        rows: the held-out pairs.
        split: their split.
        base: folder of the SFT base's own trial, whose log-probs are the reference. The base is its own reference.

    Raises:
        DivergedError: where the trained policy's log-probs are not finite; for the base it is a ValueError.
    """
    from harness.data.inputs import tokens_of
    from harness.train.logps import pair_logps

    pad_id = tokens_of(config).chat.tokenizer.pad_token_id
    logps = pair_logps(policy, rows, pad_id=pad_id, desc=f"held-out {split}").tolist()
    broken = sum(not all(map(math.isfinite, pair)) for pair in logps)
    if broken:
        error = DivergedError if ARMS[config.method.name].trainer else ValueError
        raise error(f"the log-probs of {broken} of {len(rows)} held-out {split} pairs are not finite numbers")
    reference = _stored(base, split, rows) if ARMS[config.method.name].trainer else logps
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


def _stored(base: Path, split: str, rows: tuple[TokenPair, ...]) -> list[tuple[float, float]]:
    found = {(row["split"], row["pair_id"]): row for row in read_jsonl(base / "pairs.jsonl")}
    return [
        (found[split, row.pair_id]["chosen_sum_logps"], found[split, row.pair_id]["rejected_sum_logps"]) for row in rows
    ]
