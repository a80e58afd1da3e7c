"""Looks at golden: the runs that decide at the largest registered look, and the looks log (`ledger.jsonl`).

Scores and registered looks -> the rows of the deciding seeds; the deciding runs -> warnings of unplanned looks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from harness.decide.scores_file import as_names
from harness.decide.words import plural
from harness.study.decision import Look, read_looks, write_looks
from harness.study.errors import UsageError
from harness.study.files import digest


class DecidingRuns(NamedTuple):
    """The runs that decide.

    Attributes:
        scores: the given rows without golden rows of the arms' other seeds.
        seeds: the deciding seeds per arm; as registered where no looks are.
        looks: the registered looks in rising order; empty for a single look with all seeds.
    """

    scores: pd.DataFrame
    seeds: dict[str, list[int]]
    looks: list[int]


def deciding_runs(
    scores: pd.DataFrame,
    *,
    metric: str,
    arms: Sequence[str],
    seeds: Mapping[str, Sequence[int]],
    looks: Sequence[int],
) -> DecidingRuns:
    """Return the runs that decide: the first seeds of the largest registered look that all arms have reached.

    Args:
        scores: columns `arm, seed, split, scorer`, and any others.
        metric: the scorer that decides; a seed is reached where golden has a row of it.
        arms: the arms that are compared.
        seeds: the registered seeds per arm, in order.
        looks: the registered numbers of seeds per arm; without any, all rows decide.

    Raises:
        UsageError: no look is reached yet.
    """
    planned = {arm: list(seeds.get(arm, ())) for arm in arms}
    looks = sorted(looks)
    if not looks:
        return DecidingRuns(scores, planned, [])
    golden = scores[(scores["split"] == "golden") & (scores["scorer"] == metric)]
    reached = []
    for arm in arms:
        scored = set(as_names(golden[golden["arm"] == arm]["seed"]))
        reached.append(next((i for i, seed in enumerate(planned[arm]) if str(seed) not in scored), len(planned[arm])))
    count = max((look for look in looks if look <= min(reached)), default=0)
    if not count:
        raise UsageError(
            f"the first registered look at golden is with {looks[0]} seeds per arm, and {min(reached)} are scored; "
            "finish the study with the same command"
        )
    decide = {arm: found[:count] for arm, found in planned.items()}
    wanted = {(arm, str(seed)) for arm, found in decide.items() for seed in found}
    runs = pd.Series(list(zip(scores["arm"], as_names(scores["seed"]), strict=True)), index=scores.index)
    kept = (scores["split"] != "golden") | ~scores["arm"].isin(list(decide)) | runs.isin(wanted)
    return DecidingRuns(scores[kept], decide, looks)


def log_look(study: Path, arms: Sequence[str], runs: DecidingRuns, configs: Mapping[str, Sequence[str]]) -> list[str]:
    """Add a look at golden to the looks log and return the warnings of earlier looks with other runs.

    The same seeds and configs are one look, however often they are decided: nothing is learned from it. Registered
    looks (`decide.looks`) have their own error rate and count as one.

    Args:
        study: folder of the study.
        arms: the two arms that are compared.
        runs: the runs that decide.
        configs: the registered configs per arm.

    Raises:
        UsageError: the looks log is damaged.
    """
    seeds = {arm: sorted(runs.seeds[arm]) for arm in arms}
    labels = {arm: sorted(configs.get(arm, ())) for arm in arms}
    sha256 = digest({"contrast": list(arms), "seeds": seeds, "configs": labels})
    looks = read_looks(study)
    if not any(look["sha256"] == sha256 for look in looks):
        now = datetime.now(UTC).isoformat(timespec="seconds")
        looks.append(Look(contrast=list(arms), seeds=seeds, configs=labels, sha256=sha256, looked_at=now))
        write_looks(study, looks)
    unplanned = [look for look in looks if {len(found) for found in look["seeds"].values()} - set(runs.looks)]
    if len(unplanned) + (len(unplanned) < len(looks)) < 2:
        return []
    history = ", then ".join(_look_in_words(look) for look in looks)
    return [
        f"golden was looked at {len(looks)} times with other runs ({history}): a rule that is applied again as runs "
        "are added finds a winner more often than alpha says; believe a winner only after a new study with fresh seeds"
    ]


def _look_in_words(look: Look) -> str:
    parts = []
    for arm in look["contrast"]:
        configs, seeds = plural(len(look["configs"][arm]), "config"), plural(len(look["seeds"][arm]), "seed")
        parts.append(f"{arm} {configs} x {seeds}")
    return " and ".join(parts)
