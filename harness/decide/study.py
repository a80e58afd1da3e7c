"""Decide which arm to ship: scores in, verdict out (DESIGN, section 5: unpaired seeds, paired prompts).

Command: `python -m harness.decide results/STUDY | SCORES_FILE`. Imports no torch; reads scores, whoever wrote them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from harness.config.arms import ARMS
from harness.config.keys import shown
from harness.config.schema import GUARD, RunConfig
from harness.decide.rule import verdict
from harness.decide.scores_file import read_scores
from harness.study.decision import VERDICT_FILE, Look, edge_warnings, golden_problem, read_looks, write_looks
from harness.study.errors import UsageError
from harness.study.files import digest, write_json
from harness.study.manifest import data_identity
from harness.study.registration import Registration, contrast_of, facts_warnings, read_study

__all__ = ["decide_study", "verdict"]


def decide_study(study: Path) -> dict[str, Any]:
    """Decide a study by its registered rule, enter the look in its ledger, and write verdict.json.

    Raises:
        UsageError: where the folder holds no scored study.
    """
    result, registered, seeds = decision(study)
    result["warnings"] = [*enter_look(study, registered, result["arms"], seeds), *result["warnings"]]
    write_json(study / VERDICT_FILE, result)
    return result


def decision(study: Path) -> tuple[dict[str, Any], Registration, dict[str, list[int]]]:
    """Return what the rule says of a study's scores, its registration, and the seeds that decide; write nothing.

    Raises:
        UsageError: where the folder holds no scored study.
    """
    path = study / "study.yaml"
    if not path.is_file() or not (study / "scores.csv").is_file():
        raise UsageError(
            f"{study}: no scored study (study.yaml and scores.csv); give a folder that harness.sweep wrote"
        )
    registered = read_study(path)
    arms = registered.get("contrast") or contrast_of(registered["arms"])
    if len(arms) < 2:
        raise UsageError(f"{study}: only the arm {', '.join(registered['arms'])}; a decision needs two")
    scores = read_scores(study / "scores.csv")
    _refuse_foreign(study, scores, arms, registered.get("seeds", {}))
    seeds, looks = _seeds_of_look(study, scores, registered, arms)
    result = verdict(
        _of_seeds(scores, seeds) if looks else scores,
        metric=registered["metric"],
        margin=registered["margin"],
        alpha=registered["alpha"] / max(1, len(looks)),
        arms=(arms[0], arms[1]),
        guards=registered.get("guards") or (),
    )
    if looks:
        result["look"] = {"seeds": len(seeds[arms[0]]), "registered": looks, "alpha": registered["alpha"]}
    identity = data_identity(study)
    if identity["status"] == "not proved":
        result["warnings"].append(f"identical data is NOT proved: {'; '.join(identity['reasons'])}")
    base = scores[(scores["arm"] == "sft") & (scores["split"] == "golden") & (scores["scorer"] == registered["metric"])]
    if len(base):
        result["base_mean"] = float(base["score"].mean())
    result["warnings"] += [
        *_plan_warnings(registered, result, seeds),
        *registered.get("warnings", []),
        *facts_warnings(study),
    ]
    return result, registered, seeds


def _refuse_foreign(study: Path, scores: pd.DataFrame, arms: Sequence[str], seeds: Mapping[str, Sequence[int]]) -> None:
    """Refuse golden scores of runs that were not registered or not selected, or that selected: they must not decide."""
    golden = scores[(scores["split"] == "golden") & scores["arm"].isin(list(arms))]
    runs = golden[["arm", "config", "seed"]].drop_duplicates().itertuples(index=False, name=None)
    for arm, config, seed in runs:
        number = int(seed) if str(seed).isdigit() else -1
        problem = golden_problem(study, str(arm), str(config), number)
        if not problem and arm in seeds and number not in seeds[arm]:
            problem = f"{arm} {config} seed {seed} is on golden and was not registered; take its trial's folder away"
        if problem:
            raise UsageError(f"{study / 'scores.csv'}: {problem}")


def _seeds_of_look(
    study: Path, scores: pd.DataFrame, registered: Mapping[str, Any], arms: Sequence[str]
) -> tuple[dict[str, list[int]], list[int]]:
    """Return the seeds that decide, and the registered looks.

    Where looks are registered, the decision is on the first seeds of the largest look that all arms have reached.
    """
    seeds = {arm: list(registered.get("seeds", {}).get(arm, [])) for arm in arms}
    looks = sorted(registered.get("looks") or [])
    if not looks:
        return seeds, []
    golden = scores[(scores["split"] == "golden") & (scores["scorer"] == registered["metric"])]
    reached = []
    for arm in arms:
        scored = set(golden[golden["arm"] == arm]["seed"].astype(str))
        reached.append(next((i for i, seed in enumerate(seeds[arm]) if str(seed) not in scored), len(seeds[arm])))
    count = max((look for look in looks if look <= min(reached)), default=0)
    if not count:
        raise UsageError(
            f"{study}: its first registered look at golden is with {looks[0]} seeds an arm, and {min(reached)} are "
            "scored; finish the study with the same command"
        )
    return {arm: found[:count] for arm, found in seeds.items()}, looks


def _of_seeds(scores: pd.DataFrame, seeds: Mapping[str, Sequence[int]]) -> pd.DataFrame:
    """Keep the golden rows of these seeds, and all other rows."""
    wanted = {(arm, str(seed)) for arm, found in seeds.items() for seed in found}
    runs = pd.Series(list(zip(scores["arm"], scores["seed"].astype(str), strict=True)), index=scores.index)
    return scores[(scores["split"] != "golden") | ~scores["arm"].isin(list(seeds)) | runs.isin(wanted)]


def _plan_warnings(
    registered: Mapping[str, Any], result: Mapping[str, Any], decided_by: Mapping[str, Sequence[int]]
) -> list[str]:
    """Warn where what was scored is less than what was registered, or what was registered was not fair."""
    warnings = []
    for arm in result["arms"]:
        missing = [seed for seed in decided_by[arm] if str(seed) not in result["run_means"][arm]]
        if missing:
            shown = ", ".join(map(str, missing))
            warnings.append(
                f"{arm}: registered seed {shown} has no scores (failed or unfinished); finish the study first"
            )
    configs = {arm: registered.get("configs", {}).get(arm, []) for arm in result["arms"]}
    if len({len(found) for found in configs.values()}) > 1:
        shown = ", ".join(f"{arm} {len(found)}" for arm, found in configs.items())
        warnings.append(f"unequal budgets ({shown} configs): the best of many beats the best of few by luck alone")
    for arm, found in configs.items():
        title = ARMS[arm].title if arm in ARMS else arm
        warnings += [f"{title}: {text}" for text in edge_warnings(found, result["configs"][arm])]
    return warnings


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
    by_arm = {arm: sorted(seeds[arm]) for arm in contrast}
    configs = {arm: sorted(registered.get("configs", {}).get(arm, [])) for arm in contrast}
    sha256 = digest({"contrast": contrast, "seeds": by_arm, "configs": configs})
    looks = read_looks(study)
    if not any(look["sha256"] == sha256 for look in looks):
        now = datetime.now(UTC).isoformat(timespec="seconds")
        looks.append(Look(contrast=contrast, seeds=by_arm, configs=configs, sha256=sha256, looked_at=now))
        write_looks(study, looks)
    planned = registered.get("looks") or []
    surplus = [look for look in looks if {len(found) for found in look["seeds"].values()} - set(planned)]
    if len(surplus) + (len(surplus) < len(looks)) < 2:
        return []
    history = ", then ".join(_shown(look) for look in looks)
    return [
        f"golden was looked at {len(looks)} times with other runs ({history}): a rule that is applied again as runs "
        "are added finds a winner more often than alpha says; believe a winner only after a new study with fresh seeds"
    ]


def _shown(look: Mapping[str, Any]) -> str:
    parts = []
    for arm in look["contrast"]:
        configs, seeds = len(look["configs"][arm]), len(look["seeds"][arm])
        parts.append(f"{arm} {configs} config{'s' * (configs != 1)} x {seeds} seed{'s' * (seeds != 1)}")
    return " and ".join(parts)


def problems(config: RunConfig) -> Iterator[str]:
    """Yield what is wrong with the form of the guards; `harness.score.scorers` checks their metrics."""
    metrics = []
    for guard in config.decide.guards:
        metric, margin = guard.get("metric"), guard.get("margin")
        if set(guard) != {"metric", "margin"} or not isinstance(margin, int | float) or not 0 < margin < 1:
            yield f"decide.guards: {shown(guard)}: each guard is {GUARD}"
        elif metric in metrics:
            yield f"decide.guards: {metric} is guarded twice; give it once"
        metrics.append(metric)
