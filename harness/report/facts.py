"""Provenance and costs of a study: settings and manifests -> facts as text, tables of splits, hashes and costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import pandas as pd

from harness.config.arms import ARMS, title
from harness.decide.words import MISSING, listing, percent, plural, points
from harness.report.study import COMPLETE, FAILED, UNFINISHED, Study, Trial
from harness.report.tables import Table, build
from harness.study.files import Json, Reader, mapping, number, strings
from harness.study.manifest import data_identity

_SHOWN_ELSEWHERE = ("warnings", "label_noise")
_MAX_SETTINGS = 10  # listed of a study with hundreds of configs
_FIRST_SPLIT_FACTS = ("path", "rows", "pairs", "prompts", "sha256")
_STAGES = ("load", "reference", "train", "generate", "heldout", "score")
_STAGE_TITLES = {"heldout": "held-out log-probs", "reference": "reference log-probs"}
_TRAINED, _GENERATED = "Tokens trained on", "Tokens generated"
_GIB = 2**30
_LEAST_COST = 0.05  # a cost shown as 0.0 has no meaningful ratio


def identity_of(study: Study) -> Mapping[str, Json]:
    """Return whether the arms consumed identical data: status, reasons, and hashes by seed."""
    try:
        return mapping(data_identity(study.folder, study.files))
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        # A malformed manifest proves nothing, and must not stop the report.
        return {
            "status": "not proved",
            "reasons": [f"the manifests cannot be compared ({type(error).__name__}: {error})"],
        }


def identity_sentence(identity: Mapping[str, Json]) -> str:
    """Return a sentence on identical data: `proved` only where the hashes prove it."""
    reasons = "; ".join(strings(identity.get("reasons")))
    if identity.get("status") == "proved":
        return (
            "Identical data: proved. Seed by seed, the hash of the token ids that each trainer consumed, in order, is "
            "the same in every arm."
        )
    if identity.get("status") == "not applicable":
        return f"Identical data: not applicable. {reasons or 'There are no two arms to compare.'}"
    return f"Identical data: NOT proved. {reasons or 'No reason was given.'}"


def preconditions(study: Study) -> list[str]:
    """Return what was proved before the training, a sentence for each finding; those that differ stand side by side.

    The last one is the noise of DPO's reference, the largest of the study's trials.
    """
    found: dict[str, None] = {}
    for trial in [*study.trials, *([study.base] if study.base else [])]:
        rows = trial.manifest.get("preconditions")
        for row in map(mapping, rows if isinstance(rows, list) else []):
            name, result, detail = (str(row.get(key) or "") for key in ("name", "result", "detail"))
            if name:
                found[f"{name[0].upper()}{name[1:]}: {result}. {detail[:1].upper()}{detail[1:]}."] = None
    return [*found, *_reference_noise(study.trials)]


def _reference_noise(trials: Sequence[Trial]) -> list[str]:
    """Say how far DPO's first losses are from log 2, and how far log-probs in bf16 move with their batch."""
    rows = [mapping(trial.manifest.get("reference_noise")) for trial in trials]
    largest = {
        key: max((value for row in rows if (value := number(row.get(key))) is not None), default=None)
        for key in ("first_loss_gap", "mean_nats", "largest_nats")
    }
    said = []
    if (gap := largest["first_loss_gap"]) is not None:
        said.append(f"DPO's first loss is log 2 within {gap:.1g}")
    if (mean := largest["mean_nats"]) is not None:
        said.append(
            f"in bf16 the base's log-prob of an answer moves by {mean:.2g} nats on average, and by "
            f"{largest['largest_nats']:.2g} at most, with the pairs in its batch: those of the training are used"
        )
    return [f"The reference is computed as the policy is: {'; '.join(said)}."] if said else []


def identity_table(study: Study) -> Table | None:
    """Show the hashes of the consumed token ids: one row per seed, one column per arm."""
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
    rows = {}
    for name, value in mapping(study.settings.get("data")).items():
        item = mapping(value)
        if not _is_split(item):
            continue
        first = [key for key in _FIRST_SPLIT_FACTS if key in item]
        keys = [*first, *(key for key in item if key not in first)]
        rows[str(name)] = {str(key).replace("_", " "): _split_cell(str(key), item[key]) for key in keys}
    note = "study.yaml has the whole paths and hashes."
    return build("Splits, with the first 16 digits of their SHA-256", "Split", rows, {}, note) if rows else None


def _split_cell(key: str, value: Json) -> str:
    if key == "bad_rows" and isinstance(value, list):
        return str(len(value))
    if key == "path" and str(value).count("/") > 1:
        return "…/" + "/".join(str(value).rstrip("/").split("/")[-2:])
    return phrase(value)[:16] if key == "sha256" else phrase(value)


def facts(study: Study) -> dict[str, str]:
    """Return all other facts of provenance, `{name: text}`; those without a value are left out."""
    trials = [*study.trials, *([study.base] if study.base else [])]
    settings = study.settings
    model = mapping(settings.get("model"))
    data = mapping(settings.get("data"))
    others = {key: item for key, item in data.items() if not _is_split(item) and key not in _SHOWN_ELSEWHERE}
    bad_rows = {name: mapping(item).get("bad_rows") for name, item in data.items()}
    methods = sorted({f"{title(t.arm)}: {_method_settings(t)}" for t in study.trials if t.manifest})
    more = f"and {len(methods) - _MAX_SETTINGS} more: see Trials"
    rule = (
        f"margin {points(settings.get('margin'), signed=False)} points, alpha {phrase(settings.get('alpha'))}"
        if settings
        else ""
    )
    found = {
        "Model": phrase(model.get("path")),
        "Model revision": phrase(model.get("revision")),
        "Model is made of": phrase(model.get("made_of")),
        "SHA-256 of the base's weights": _common_fact(trials, "base_sha256") or phrase(model.get("base_sha256")),
        "Label noise": _label_noise(study.trials),
        "Pairs dropped after tokenisation": _common_fact(trials, "dropped_pairs"),
        **{f"Rows of {name} that cannot be used": phrase(rows) for name, rows in bad_rows.items() if rows},
        **{f"Data: {key.replace('_', ' ')}": phrase(item) for key, item in others.items()},
        "Method settings": " | ".join(methods if len(methods) <= _MAX_SETTINGS else [*methods[:_MAX_SETTINGS], more]),
        "Decision rule": rule,
        "Hardware": _common_fact(trials, "hardware"),
        "Versions": _common_fact(trials, "versions"),
        "Commit": _common_fact(trials, "commit"),
        "Registered": phrase(settings.get("created")),
    }
    return {name: text for name, text in found.items() if text and text != MISSING}


def failed_trials(study: Study) -> list[dict[str, str]]:
    """Return the trials without a result, each with its error."""
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


def phrase(value: Json) -> str:
    """Format a JSON value as one phrase."""
    if isinstance(value, Mapping):
        return "; ".join(_phrase_of_item(str(key), item) for key, item in value.items()) or "none"
    if isinstance(value, list | tuple):
        shown = ", ".join(phrase(item) for item in value[:10])
        return (f"{shown} and {len(value) - 10} more" if len(value) > 10 else shown) or "none"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return MISSING if value is None or value == "" else str(value)


def _phrase_of_item(key: str, value: Json) -> str:
    size = number(value)
    if key.endswith("_bytes") and size is not None:
        return f"{key.removesuffix('_bytes')}: {size / 2**30:.1f} GiB"
    return f"{key}: {phrase(value)}"


def _method_settings(trial: Trial) -> str:
    """Format the arm's hyperparameters, without its name and unused default learning rates."""
    method = mapping(trial.manifest.get("method"))
    return phrase(
        {key: value for key, value in method.items() if key not in ("name", "learning_rates", "learning_rate_factor")}
    )


def _is_split(value: Json) -> bool:
    return isinstance(value, Mapping) and bool(set(_FIRST_SPLIT_FACTS) & set(value))


def _common_fact(trials: Sequence[Trial], key: str) -> str:
    """Return a fact that all trials share, or each of its values with its number of trials."""
    values: dict[str, int] = {}
    for trial in trials:
        if value := trial.manifest.get(key):
            text = phrase(value)
            values[text] = values.get(text, 0) + 1
    if len(values) <= 1:
        return next(iter(values), "")
    return "differs: " + " | ".join(f"{plural(count, 'trial')}: {text}" for text, count in values.items())


def _label_noise(trials: Sequence[Trial]) -> str:
    texts = set()
    for trial in trials:
        noise = mapping(trial.manifest.get("label_noise"))
        if number(noise.get("share")):
            texts.add(
                f"{percent(noise['share'])} of the training labels flipped ({phrase(noise.get('flipped'))} pairs)"
            )
    return "; ".join(sorted(texts)) or ("none" if trials else "")


def cost_table(study: Study) -> Table | None:
    """Compare the configs over their complete trials on the engine that all arms have in common.

    Where the arms share no engine, each arm's costs are shown with its engine and without a ratio.
    """
    used = _engines_by_arm(study)
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
    frame = _mean_costs(chosen)
    rows = {str(name): {label: _cost_cell(str(name), row[label]) for label in chosen} for name, row in frame.iterrows()}
    if common and len(chosen) > 1:
        first, second = list(chosen)[:2]
        heading = f"{title(chosen[first][0].arm)} / {title(chosen[second][0].arm)}"
        for name, cells in rows.items():
            cells[heading] = _ratio_cell(frame[first][name], frame[second][name])
    rows["Engine"] = {label: listing(sorted({_engine(t) for t in trials})) for label, trials in chosen.items()}
    rows["Seeds"] = {label: str(len(trials)) for label, trials in chosen.items()}
    arms = {label: trials[0].arm for label, trials in chosen.items()}
    return build("Cost of one trial: mean over seeds", "Cost", rows, arms, *_cost_notes(study, used, common))


def _mean_costs(chosen: Mapping[str, Sequence[Trial]]) -> pd.DataFrame:
    """Return the mean costs: one row per measured cost, in the order of the stages, and one column per config.

    A speed is mean tokens over mean seconds: a mean of the trials' speeds would overrate a single fast one.
    """
    costs = {label: pd.DataFrame([_costs_of(trial) for trial in trials]).mean() for label, trials in chosen.items()}
    stages = [_seconds_of(stage) for stage in _STAGES]
    names = list(dict.fromkeys([*stages, *(name for mean in costs.values() for name in mean.index)]))
    names.sort(key=lambda name: not name.startswith("Seconds: "))
    frame = pd.DataFrame(costs).reindex(names).dropna(how="all")
    for tokens, stage in ((_TRAINED, "train"), (_GENERATED, "generate")):
        seconds = _seconds_of(stage)
        if tokens in frame.index and seconds in frame.index:
            frame.loc[f"{tokens} per second"] = frame.loc[tokens] / frame.loc[seconds].replace(0.0, float("nan"))
    return frame


def _seconds_of(stage: str) -> str:
    return f"Seconds: {_STAGE_TITLES.get(stage, stage)}"


def _engines_by_arm(study: Study) -> dict[str, set[str]]:
    """Return the engines of each arm's complete trials."""
    found: dict[str, set[str]] = {}
    for trial in study.trials:
        if trial.state == COMPLETE:
            found.setdefault(trial.arm, set()).add(_engine(trial))
    return found


def _costs_of(trial: Trial) -> dict[str, float | None]:
    """Return a trial's costs by name; None where a cost was not measured."""
    seconds, peak, tokens = (mapping(trial.manifest.get(key)) for key in ("seconds", "peak_memory_bytes", "tokens"))
    stages = [*(stage for stage in _STAGES if stage in seconds), *sorted(set(seconds) - set(_STAGES))]
    costs = {_seconds_of(stage): number(seconds[stage]) for stage in stages}
    if stages:
        costs["Seconds in all"] = sum(value or 0.0 for value in costs.values())
    memory = number(peak.get("train"))
    return costs | {
        "Peak memory of training (GiB)": memory / _GIB if memory else None,
        _TRAINED: number(tokens.get("train")),
        _GENERATED: number(tokens.get("generated")),
    }


def _cost_cell(name: str, value: float) -> str:
    if number(value) is None:
        return MISSING
    digits = 0 if name.startswith("Tokens") else 2 if "GiB" in name else 1
    return f"{value:,.{digits}f}"


def _ratio_cell(first: float, second: float) -> str:
    usable = all(number(value) is not None and value >= _LEAST_COST for value in (first, second))
    return f"{first / second:.2f}×" if usable else MISSING


def _engine(trial: Trial) -> str:
    return str(trial.manifest.get("engine") or "unknown")


def _cost_notes(study: Study, used: Mapping[str, set[str]], common: list[str]) -> list[str]:
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


class TrainingCost(NamedTuple):
    """The cost of one training.

    Attributes:
        memory_bytes: peak of the training.
        seconds: of the training; `reference_seconds` of the reference pass before it.
        conditions: engine, hardware and number of training tokens: costs compare only where these are equal.
    """

    memory_bytes: float | None
    seconds: float | None
    reference_seconds: float | None
    conditions: dict[str, str]


def training_costs(study: Study) -> dict[str, list[TrainingCost]]:
    """Return one entry per trial, by arm; arms with a reference by arm and reference mode (`dpo-cached`).

    From the trials that ran side by side for their cost (`costs/`) if there are any, else from the study's own.
    """
    reader = Reader(study.folder, study.files)
    manifests = [reader.mapping(path) for path in sorted((study.folder / "costs").glob("*/manifest.json"))]
    manifests = manifests or [dict(trial.manifest) for trial in study.trials if trial.state == COMPLETE]
    found: dict[str, list[TrainingCost]] = {}
    for manifest in manifests:
        seconds, peak = mapping(manifest.get("seconds")), mapping(manifest.get("peak_memory_bytes"))
        arm, engine = str(manifest.get("arm")), manifest.get("engine")
        mode = manifest.get("reference") or ("adapter_off" if engine == "stock" else "cached")
        name = f"{arm}-{mode}" if arm in ARMS and ARMS[arm].uses_reference else arm
        conditions = {
            "engine": str(engine),
            "hardware": str(mapping(manifest.get("hardware"))),
            "tokens": str(mapping(manifest.get("tokens")).get("train")),
        }
        cost = TrainingCost(
            number(peak.get("train")), number(seconds.get("train")), number(seconds.get("reference")), conditions
        )
        found.setdefault(name, []).append(cost)
    return found


def mean_and_range(values: Sequence[float], scale: float) -> str:
    """Format the mean of measurements, with their range where there are several."""
    shown = [value / scale for value in values]
    mean = f"{sum(shown) / len(shown):.2f}"
    return mean if len(shown) == 1 else f"{mean} ({min(shown):.2f} to {max(shown):.2f})"
