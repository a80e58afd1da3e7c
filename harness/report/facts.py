"""Where a study's numbers come from: identical data, splits, model, versions, machine, and the trials that failed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from harness.config.arms import ARMS, title
from harness.report.study import COMPLETE, FAILED, UNFINISHED, Study, Trial
from harness.report.tables import Table, build
from harness.report.words import MISSING, listing, percent, plural, points
from harness.study.files import Reader, mapping, number

_SAID = ("warnings", "label_noise")  # shown elsewhere
_SHOWN = 10  # settings that a study with hundreds of configs lists
_FIRST = ("path", "rows", "pairs", "prompts", "sha256")


def identity_of(study: Study) -> Mapping[str, Any]:
    """Return whether the arms consumed identical data: status, reasons and hashes by seed."""
    from harness.study.manifest import data_identity

    try:
        return mapping(data_identity(study.folder))
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        # A manifest that is not of the harness's form proves nothing, and must not stop the report.
        return {
            "status": "not proved",
            "reasons": [f"the manifests cannot be compared ({type(error).__name__}: {error})"],
        }


def identity_sentence(identity: Mapping[str, Any]) -> str:
    """Say whether the arms saw identical data: `proved` only where the hashes prove it."""
    reasons = "; ".join(str(reason) for reason in identity.get("reasons") or ())
    if identity.get("status") == "proved":
        return (
            "Identical data: proved. Seed by seed, the hash of the token ids that each trainer consumed, in order, is "
            "the same in every arm."
        )
    if identity.get("status") == "not applicable":
        return f"Identical data: not applicable. {reasons or 'There are no two arms to compare.'}"
    return f"Identical data: NOT proved. {reasons or 'No reason was given.'}"


def identity_table(study: Study) -> Table | None:
    """Show the hashes of the consumed token ids: a row a seed, a column an arm."""
    rows: dict[str, dict[str, str]] = {}
    trials = [(study.label(config), trial) for config in study.configs for trial in config.trials]
    for label, trial in sorted(trials, key=lambda item: (item[1].seed is None, item[1].seed or 0)):
        consumed = str(trial.manifest.get("consumed_tokens_sha256") or "")
        expected = str(trial.manifest.get("expected_tokens_sha256") or "")
        mark = " ≠ its batch plan" if consumed and expected and consumed != expected else ""
        name = "Seed unknown" if trial.seed is None else f"Seed {trial.seed}"
        rows.setdefault(name, {})[label] = consumed[:16] + mark if consumed else "none"
    if not rows:
        return None
    arms = {study.label(config): config.arm for config in study.configs}
    table = build("Consumed token ids, in order: first 16 digits of the SHA-256", "Seed", rows, arms)
    return replace(table, code=True)


def split_table(study: Study) -> Table | None:
    """Show the splits with their counts and hashes, as study.yaml registered them."""
    splits = {name: item for name, item in mapping(study.settings.get("data")).items() if _is_split(item)}
    rows = {}
    for name, item in splits.items():
        keys = [*(key for key in _FIRST if key in item), *(key for key in item if key not in _FIRST)]
        rows[str(name)] = {str(key).replace("_", " "): _split_cell(str(key), item[key]) for key in keys}
    note = "study.yaml has the whole paths and hashes."
    return build("Splits, with the first 16 digits of their SHA-256", "Split", rows, {}, note) if rows else None


def _split_cell(key: str, value: Any) -> str:
    if key == "bad_rows" and isinstance(value, list):
        return str(len(value))
    if key == "path" and str(value).count("/") > 1:
        return "…/" + "/".join(str(value).rstrip("/").split("/")[-2:])
    return phrase(value)[:16] if key == "sha256" else phrase(value)


def facts(study: Study) -> dict[str, str]:
    """Return all other facts of provenance, `{name: text}`."""
    trials = [*study.trials, *([study.base] if study.base else [])]
    settings = study.settings
    model = mapping(settings.get("model"))
    data = mapping(settings.get("data"))
    others = {str(key): phrase(value) for key, value in data.items() if not _is_split(value) and key not in _SAID}
    bad_rows = {name: mapping(item).get("bad_rows") for name, item in data.items()}
    methods = sorted({f"{title(t.arm)}: {_method(t)}" for t in study.trials if t.manifest})
    more = f"and {len(methods) - _SHOWN} more: see Trials"
    rule = (
        f"margin {points(settings.get('margin'), signed=False)} points, alpha {phrase(settings.get('alpha'))}"
        if settings
        else ""
    )
    found = {
        "Model": phrase(model.get("path")),
        "Model revision": phrase(model.get("revision")),
        "SHA-256 of the base's weights": _same(trials, "base_sha256") or phrase(model.get("base_sha256")),
        "Label noise": _label_noise(study.trials),
        "Pairs dropped after tokenisation": _same(trials, "dropped_pairs"),
        **{f"Rows of {name} that cannot be used": phrase(rows) for name, rows in bad_rows.items() if rows},
        **{f"Data: {name.replace('_', ' ')}": text for name, text in others.items()},
        "Method settings": " | ".join(methods if len(methods) <= _SHOWN else [*methods[:_SHOWN], more]),
        "Decision rule": rule,
        "Hardware": _same(trials, "hardware"),
        "Versions": _same(trials, "versions"),
        "Commit": _same(trials, "commit"),
        "Registered": phrase(settings.get("created")),
    }
    return {name: text for name, text in found.items() if text and text != MISSING}


def failed_trials(study: Study) -> list[dict[str, str]]:
    """Return the trials that have no result, with the error that they ended with."""
    found = []
    for trial in study.trials:
        if trial.state not in (FAILED, UNFINISHED):
            continue
        error = ": ".join(str(trial.failure[key]) for key in ("error", "message") if trial.failure.get(key))
        found.append(
            {
                "trial_id": trial.trial_id,
                "arm": title(trial.arm) or "arm unknown",
                "seed": "unknown" if trial.seed is None else str(trial.seed),
                "stage": str(trial.failure.get("stage") or "unknown stage"),
                "error": error or "It was not finished, and left no error: it is running, or it was killed.",
            }
        )
    return found


def phrase(value: Any) -> str:
    """Write a JSON value as one phrase."""
    if isinstance(value, Mapping):
        return "; ".join(_entry(str(key), item) for key, item in value.items()) or "none"
    if isinstance(value, list | tuple):
        shown = ", ".join(phrase(item) for item in value[:10])
        return (f"{shown} and {len(value) - 10} more" if len(value) > 10 else shown) or "none"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return MISSING if value is None or value == "" else str(value)


def _entry(key: str, value: Any) -> str:
    size = number(value)
    if key.endswith("_bytes") and size is not None:
        return f"{key.removesuffix('_bytes')}: {size / 2**30:.1f} GiB"
    return f"{key}: {phrase(value)}"


def _method(trial: Trial) -> str:
    """Write the arm's settings that were used: not its name, nor the rates that it would have had otherwise."""
    method = mapping(trial.manifest.get("method"))
    return phrase(
        {key: value for key, value in method.items() if key not in ("name", "learning_rates", "learning_rate_factor")}
    )


def _is_split(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(set(_FIRST) & set(value))


def _same(trials: list[Trial], key: str) -> str:
    """Say a fact of all trials once, or each of its values with the number of trials that have it."""
    values: dict[str, int] = {}
    for trial in trials:
        if trial.manifest.get(key):
            text = phrase(trial.manifest[key])
            values[text] = values.get(text, 0) + 1
    if len(values) <= 1:
        return next(iter(values), "")
    return "differs: " + " | ".join(f"{plural(count, 'trial')}: {text}" for text, count in values.items())


def _label_noise(trials: tuple[Trial, ...]) -> str:
    texts = set()
    for trial in trials:
        noise = mapping(trial.manifest.get("label_noise"))
        if number(noise.get("share")):
            texts.add(
                f"{percent(noise['share'])} of the training labels flipped ({phrase(noise.get('flipped'))} pairs)"
            )
    return "; ".join(sorted(texts)) or ("none" if trials else "")


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
