"""manifest.json of a trial: read and write it sealed; and whether the manifests of a study prove identical data.

Input of `data_identity`: the manifests -> output: a status with reasons, for the verdict's warnings and the report.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

from harness.study.errors import UsageError
from harness.study.files import FileCache, FileRecord, Json, is_broken, read_json, seal, to_json

FILE = "manifest.json"


class Provenance(TypedDict):
    """What a trial ran on: versions of the packages, commit (None outside a checkout), hardware."""

    versions: dict[str, str]
    commit: str | None
    hardware: dict[str, int | str | None]


class Manifest(TypedDict, total=False):
    """manifest.json of a trial; each stage adds its keys, and an empty mapping stands for a trial without one.

    Attributes:
        trial_id, arm, config, seed: the trial.
        status: `running`, `complete` or `diverged`, the last with `divergence`.
        flags: `diverged` or `collapsed`.
        done: the finished stages: `train`, `dev`, `golden`, `score`.
        method, engine, reference: settings of the training.
        versions, commit, hardware: of the process that trained.
        seconds, peak_memory_bytes: by stage.
        tokens: `train` and `generated`.
        base_sha256, data_sha256, batch_plan_sha256: of the base's weights, of token ids and masks, of the batch plan.
        consumed_tokens_sha256, expected_tokens_sha256: of the token ids that the trainer read, and of the plan's.
        pairs: number of pairs by split; `dropped_pairs`: number by split and reason.
        padding_share: of all positions.
        reference_noise: of DPO's reference: `first_loss_gap`, the first loss's distance to log 2; in bf16 also by how
            many nats an answer's log-prob moves with its batch, `mean_nats` and `largest_nats`.
        packed, why_padded: whether sequences were packed, and why not.
        preconditions: what was proved before the training (`Finding`).
        files: each file by its name in the trial's folder.
        degenerate: shares of degenerate answers by split and kind.
        ended: share of the answers that end by themselves, by split.
        weights_deleted: the policy that deleted the weights (`keep`).
        source: file of the answers where another tool generated them.
        sha256: the seal.
    """

    trial_id: str
    arm: str
    config: str
    seed: int
    status: str
    divergence: str
    flags: list[str]
    done: list[str]
    method: dict[str, Json]
    engine: str
    reference: str
    versions: dict[str, str]
    commit: str | None
    hardware: dict[str, int | str | None]
    warnings: list[str]
    seconds: dict[str, float]
    peak_memory_bytes: dict[str, int]
    tokens: dict[str, int]
    created: str
    base_sha256: str
    data_sha256: str
    batch_plan_sha256: str
    consumed_tokens_sha256: str
    expected_tokens_sha256: str
    pairs: dict[str, int]
    dropped_pairs: dict[str, dict[str, int]]
    label_noise: dict[str, Any]
    micro_batch_size: int
    padding_share: float
    parameters: dict[str, int]
    reference_noise: dict[str, float]
    packed: bool
    why_padded: str
    preconditions: list[dict[str, str]]
    files: dict[str, FileRecord]
    degenerate: dict[str, dict[str, float]]
    ended: dict[str, float]
    weights_deleted: str
    source: dict[str, str]
    sha256: str


@dataclass(frozen=True)
class Finding:
    """One precondition and how it came out.

    Attributes:
        name: a few words, such as `training is deterministic`; unique within a trial.
        result: `proved`; `warned` where the reader should know of it; `not proved`; or what follows (`padded`).
        detail: a sentence for the reader of the report, with its figures.
    """

    name: str
    result: str
    detail: str


def with_findings(recorded: Sequence[dict[str, str]], found: Iterable[Finding]) -> list[dict[str, str]]:
    """Return the manifest's list with findings added; a finding of the same name is replaced."""
    rows = {row["name"]: row for row in recorded}
    return list((rows | {finding.name: asdict(finding) for finding in found}).values())


def write_manifest(folder: Path, manifest: Manifest, files: FileCache | None = None) -> None:
    """Write a trial's manifest with its seal."""
    (files or FileCache()).write_text(folder / FILE, to_json(seal(manifest)))


def read_manifest(folder: Path, files: FileCache | None = None) -> Manifest:
    """Return a trial's manifest without its seal; empty where it is absent, damaged or changed."""
    try:
        found: Manifest = read_json(folder / FILE, files)
    except (OSError, ValueError):  # absent, cut off or damaged
        return {}
    if not is_as_written(found):
        return {}
    found.pop("sha256", None)
    return found


def load_manifest(folder: Path, files: FileCache | None = None) -> Manifest:
    """Return a trial's manifest without its seal.

    Raises:
        UsageError: where it is absent, damaged or changed.
    """
    manifest = read_manifest(folder, files)
    if not manifest:
        raise UsageError(
            f"{folder / FILE}: is lost, damaged or was changed since its trial wrote it; run the sweep's command "
            "again, which runs the trial again"
        )
    return manifest


def is_as_written(manifest: object) -> bool:
    """Return False for content of manifest.json that was changed since its trial wrote it."""
    return isinstance(manifest, dict) and not is_broken(manifest)


# What must be equal across the arms of a seed, with the name that a reader knows.
_EQUAL: dict[Literal["consumed_tokens_sha256", "batch_plan_sha256", "data_sha256", "base_sha256"], str] = {
    "consumed_tokens_sha256": "consumed tokens",
    "batch_plan_sha256": "batch plan",
    "data_sha256": "token ids",
    "base_sha256": "base weights",
}


class DataIdentity(TypedDict):
    """Whether all arms consumed the same tokens in the same order.

    Attributes:
        status: `proved`, `not proved`, or `not applicable` with fewer than two arms.
        reasons: why it is not proved; damaged and changed manifests.
        by_seed: hash of the consumed tokens by seed and arm.
    """

    status: str
    reasons: list[str]
    by_seed: dict[str, dict[str, str]]


def data_identity(study: Path, files: FileCache | None = None) -> DataIdentity:
    """Compare, seed by seed, the token ids that the trainers of a study's arms consumed."""
    trials, reasons = _manifests(study, files)
    complete = [trial for trial in trials if trial.get("status") == "complete"]
    arms = sorted({trial["arm"] for trial in complete})
    by_seed: dict[str, dict[str, str]] = {}
    for trial in complete:
        by_seed.setdefault(str(trial["seed"]), {})[trial["arm"]] = trial.get("consumed_tokens_sha256") or "missing"
    if len(arms) < 2:
        return {"status": "not applicable", "reasons": reasons, "by_seed": by_seed}
    diverged = {(str(trial["seed"]), trial["arm"]) for trial in trials if trial.get("status") == "diverged"}
    for seed in sorted(by_seed, key=_seed_order):
        lacking = [arm for arm in arms if arm not in by_seed[seed] and (seed, arm) not in diverged]
        if lacking:
            reasons.append(f"seed {seed} has no complete trial of {', '.join(lacking)}")
        reasons += _data_differences(seed, [trial for trial in complete if str(trial["seed"]) == seed])
    return {"status": "not proved" if reasons else "proved", "reasons": reasons, "by_seed": by_seed}


def _manifests(study: Path, files: FileCache | None) -> tuple[list[Manifest], list[str]]:
    """Return the manifests of a study's trials, and one reason per manifest that cannot be believed."""
    found: list[Manifest] = []
    reasons = []
    for path in sorted((study / "trials").glob(f"*/{FILE}")):
        try:
            manifest = read_json(path, files)
        except ValueError as error:
            reasons.append(f"manifest of trial {path.parent.name} is not readable: {error}")
            continue
        if is_as_written(manifest):
            found.append(manifest)
        else:
            reasons.append(f"manifest of trial {path.parent.name} was changed after the trial wrote it")
    return found, reasons


def _data_differences(seed: str, trials: list[Manifest]) -> list[str]:
    reasons = []
    for key, name in _EQUAL.items():
        values = {trial.get(key) for trial in trials}
        if None in values or "" in values:
            arms = sorted({trial["arm"] for trial in trials if not trial.get(key)})
            reasons.append(f"seed {seed}: the {name} of {', '.join(arms)} are not recorded")
        elif len(values) > 1:
            reasons.append(f"seed {seed}: the {name} differ between arms")
    for trial in trials:
        expected = trial.get("expected_tokens_sha256")
        if expected and trial.get("consumed_tokens_sha256") not in (None, expected):
            reasons.append(f"seed {seed}: the trainer of {trial['arm']} did not consume the batch plan")
    return reasons


def _seed_order(seed: str) -> tuple[int, str]:
    return (int(seed), "") if seed.lstrip("-").isdigit() else (1 << 62, seed)
