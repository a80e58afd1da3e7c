"""The ledger of a study: every look at golden, so that looking again with more runs cannot stay unsaid.

Adding seeds, configs or arms after a look and deciding once more finds a winner far too often (optional stopping).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness.records import UsageError, digest, read_jsonl
from harness.twins import write_twice

FILE = "ledger.jsonl"


def enter_look(
    study: Path, registered: Mapping[str, Any], contrast: list[str], seeds: Mapping[str, list[int]]
) -> list[str]:
    """Enter a look at golden and return the verdict's warnings of earlier looks with other runs.

    The same seeds and configs are one look, however often they are decided: nothing is learned from it. Looks that were
    registered (`decide.looks`) have their own error rate and count as one.

    Args:
        study: the study's folder.
        registered: contents of study.yaml.
        contrast: the two arms that are compared.
        seeds: those that decide, by arm.

    Raises:
        UsageError: where the ledger is damaged.
    """
    runs = {
        "contrast": contrast,
        "seeds": {arm: sorted(seeds[arm]) for arm in contrast},
        "configs": {arm: sorted(registered.get("configs", {}).get(arm, [])) for arm in contrast},
    }
    looks = _looks(study)
    if not any(look["sha256"] == digest(runs) for look in looks):
        looks.append(runs | {"sha256": digest(runs), "looked_at": datetime.now(UTC).isoformat(timespec="seconds")})
        write_twice(study / FILE, "".join(json.dumps(look, ensure_ascii=False) + "\n" for look in looks))
    planned = registered.get("looks") or []
    surplus = [look for look in looks if {len(found) for found in look["seeds"].values()} - set(planned)]
    if len(surplus) + (len(surplus) < len(looks)) < 2:
        return []
    history = ", then ".join(_shown(look) for look in looks)
    return [
        f"golden was looked at {len(looks)} times with other runs ({history}): a rule that is applied again as runs "
        "are added finds a winner more often than alpha says; believe a winner only after a new study with fresh seeds"
    ]


def _looks(study: Path) -> list[dict[str, Any]]:
    path = study / FILE
    if not path.is_file():
        return []
    try:
        return list(read_jsonl(path))
    except ValueError as error:
        raise UsageError(
            f"{error}; it counts the looks at golden: put it back as it was, nothing else mends it"
        ) from error


def _shown(look: Mapping[str, Any]) -> str:
    parts = []
    for arm in look["contrast"]:
        configs, seeds = len(look["configs"][arm]), len(look["seeds"][arm])
        parts.append(f"{arm} {configs} config{'s' * (configs != 1)} x {seeds} seed{'s' * (seeds != 1)}")
    return " and ".join(parts)
