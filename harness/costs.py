"""What the arms cost: seconds by stage, memory, tokens and speed, on one engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from harness.arms import ARMS
from harness.frames import Table, build
from harness.palette import title
from harness.reader import Reader
from harness.study import COMPLETE, Study, Trial, mapping
from harness.wording import MISSING, listing, number, plural

_STAGES = ("load", "reference", "train", "generate", "heldout", "score")
_NAMES = {"heldout": "held-out log-probs", "reference": "reference log-probs"}
_TRAINED, _GENERATED = "Tokens trained on", "Tokens generated"
_GIB = 2**30
_LEAST = 0.05  # what is shown as 0.0 has no ratio that means anything


def cost_table(study: Study) -> Table | None:
    """Compare the configs over their complete trials on the engine that all arms have in common.

    Where the arms share no engine, each arm's costs are shown with its engine and without a ratio.
    """
    used = engines(study)
    common = sorted(set.intersection(*used.values())) if used else []
    chosen = {
        study.label(config): [
            t for t in config.trials if t.state == COMPLETE and (not common or _engine(t) == common[0])
        ]
        for config in study.configs
    }
    chosen = {label: trials for label, trials in chosen.items() if trials}
    if not chosen:
        return None
    frame = _means(chosen)
    rows = {str(name): {label: _format(str(name), row[label]) for label in chosen} for name, row in frame.iterrows()}
    if common and len(chosen) > 1:
        first, second = list(chosen)[:2]
        heading = f"{title(chosen[first][0].arm)} / {title(chosen[second][0].arm)}"
        for name, cells in rows.items():
            cells[heading] = _ratio(frame[first][name], frame[second][name])
    rows["Engine"] = {label: listing(sorted({_engine(t) for t in trials})) for label, trials in chosen.items()}
    rows["Seeds"] = {label: str(len(trials)) for label, trials in chosen.items()}
    arms = {label: trials[0].arm for label, trials in chosen.items()}
    return build("Cost of one trial: mean over seeds", "Cost", rows, arms, *_notes(study, used, common))


def _means(chosen: Mapping[str, Sequence[Trial]]) -> pd.DataFrame:
    """Return the mean costs: a row a cost that was measured, in the order of the stages, a column a config.

    A speed is mean tokens over mean seconds: a mean of the trials' speeds would overrate a single fast one.
    """
    costs = {label: pd.DataFrame([measure(trial) for trial in trials]).mean() for label, trials in chosen.items()}
    stages = [_second(stage) for stage in _STAGES]
    names = list(dict.fromkeys([*stages, *(name for mean in costs.values() for name in mean.index)]))
    names.sort(key=lambda name: not name.startswith("Seconds: "))
    frame = pd.DataFrame(costs).reindex(names).dropna(how="all")
    for tokens, stage in ((_TRAINED, "train"), (_GENERATED, "generate")):
        if tokens in frame.index and _second(stage) in frame.index:
            frame.loc[f"{tokens} per second"] = frame.loc[tokens] / frame.loc[_second(stage)].replace(0.0, float("nan"))
    return frame


def _second(stage: str) -> str:
    return f"Seconds: {_NAMES.get(stage, stage)}"


def engines(study: Study) -> dict[str, set[str]]:
    """Return the engines of each arm's complete trials."""
    found: dict[str, set[str]] = {}
    for trial in study.trials:
        if trial.state == COMPLETE:
            found.setdefault(trial.arm, set()).add(_engine(trial))
    return found


def measure(trial: Trial) -> dict[str, float | None]:
    """Return a trial's costs by name; None where something was not measured."""
    seconds, peak, tokens = (mapping(trial.manifest.get(key)) for key in ("seconds", "peak_memory_bytes", "tokens"))
    stages = [*(stage for stage in _STAGES if stage in seconds), *sorted(set(seconds) - set(_STAGES))]
    costs = {_second(stage): number(seconds[stage]) for stage in stages}
    if stages:
        costs["Seconds in all"] = sum(value or 0.0 for value in costs.values())
    memory = number(peak.get("train"))
    return costs | {
        "Peak memory of training (GiB)": memory / _GIB if memory else None,
        _TRAINED: number(tokens.get("train")),
        _GENERATED: number(tokens.get("generated")),
    }


def _format(name: str, value: float) -> str:
    if number(value) is None:
        return MISSING
    digits = 0 if name.startswith("Tokens") else 2 if "GiB" in name else 1
    return f"{value:,.{digits}f}"


def _ratio(first: float, second: float) -> str:
    usable = all(number(value) is not None and value >= _LEAST for value in (first, second))
    return f"{first / second:.2f}×" if usable else MISSING


def _engine(trial: Trial) -> str:
    return str(trial.manifest.get("engine") or "unknown")


def _notes(study: Study, used: Mapping[str, set[str]], common: list[str]) -> list[str]:
    notes = ["A reference that was read from the cache costs next to nothing: the first trial of a study pays for all."]
    if not common:
        each = "; ".join(f"{title(arm)}: {listing(sorted(names))}" for arm, names in used.items())
        notes.append(f"The arms were trained with different engines ({each}), so that their costs are not comparable.")
    elif any(len(names) > 1 for names in used.values()):
        notes.append(f"Only trials with the engine “{common[0]}” are compared; others were left out of this table.")
    machines = {str(sorted(mapping(t.manifest.get("hardware")).items())) for t in study.trials if t.state == COMPLETE}
    if len(machines) > 1:
        notes.append(f"The trials ran on {plural(len(machines), 'different machine')}: compare the seconds with care.")
    return notes


def measured(study: Study) -> dict[str, list[dict[str, Any]]]:
    """Return what training cost, by arm, and for arms with a reference by the way to it: a row a trial.

    From the trials that were run side by side for their cost (`costs/`), if any; else from the study's own.
    """
    reader = Reader(study.folder)
    paths = sorted((study.folder / "costs").glob("*/manifest.json"))
    manifests = [reader.mapping(path) for path in paths]
    manifests = manifests or [dict(trial.manifest) for trial in study.trials if trial.state == COMPLETE]
    found: dict[str, list[dict[str, Any]]] = {}
    for manifest in manifests:
        seconds, peak = mapping(manifest.get("seconds")), mapping(manifest.get("peak_memory_bytes"))
        arm = str(manifest.get("arm"))
        way = manifest.get("reference") or ("adapter_off" if manifest.get("engine") == "stock" else "cached")
        name = f"{arm}-{way}" if arm in ARMS and ARMS[arm].uses_reference else arm
        found.setdefault(name, []).append(
            {
                "memory": number(peak.get("train")),
                "seconds": number(seconds.get("train")),
                "reference_seconds": number(seconds.get("reference")),
                "engine": manifest.get("engine"),
                "hardware": mapping(manifest.get("hardware")),
                "tokens": mapping(manifest.get("tokens")).get("train"),
            }
        )
    return found


def mean_and_range(values: Sequence[float], scale: float) -> str:
    """Write the mean of measurements, with their range where there are several."""
    shown = [value / scale for value in values]
    mean = f"{sum(shown) / len(shown):.2f}"
    return mean if len(shown) == 1 else f"{mean} ({min(shown):.2f} to {max(shown):.2f})"
