"""The top of a report: the verdict in words with its key facts, and all warnings of a study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from harness.config.arms import title
from harness.decide.beside import length_caveats
from harness.decide.recommend import recommendation_line
from harness.decide.words import (
    LEVELS,
    MISSING,
    ahead,
    alpha_of,
    below_base,
    confidences,
    headline,
    interval,
    percent,
    plural,
    points,
)
from harness.report.study import DIVERGED, FAILED, UNFINISHED, Study
from harness.report.style import DEFINITIONS, PREFERENCE, SCORERS
from harness.study.files import Json, mapping, number, strings
from harness.study.registration import MARGIN

_SAME_MEAN = 1e-6
_MAX_NAMES = 4  # runs that a warning lists


class Summary(NamedTuple):
    """The verdict of a study in words.

    Attributes:
        headline: the verdict in a few words.
        reason: its sentence, or the progress of a study without a verdict.
        level: the meaning of its level; empty without a verdict.
        key_facts: its numbers, `{name: text}`.
        recommendation: what to ship, why, and what to do next, as the terminal prints it.
        caveats: what stands beside it.
    """

    headline: str
    reason: str
    level: str
    key_facts: dict[str, str]
    recommendation: str
    caveats: list[str]


def summarise(study: Study) -> Summary:
    """Return the verdict of a study in words."""
    return Summary(
        headline=headline(study.verdict, study.arms),
        reason=_reason(study),
        level=LEVELS.get(str(study.verdict.get("level") or ""), ""),
        key_facts=_key_facts(study),
        recommendation=recommendation_line(study.verdict),
        caveats=_caveats(study),
    )


def _reason(study: Study) -> str:
    if study.verdict:
        return str(study.verdict.get("reason") or "The verdict gives no reason.")
    done = sum(trial.scored for trial in study.trials)
    if not study.trials:
        return "No trial has been run in this study."
    return (
        f"{done} of {plural(len(study.trials), 'started trial')} {'is' if done == 1 else 'are'} scored, and the "
        "decision has not been made; run the sweep's command again, or `python -m harness.decide` on this folder."
    )


def disagreement(study: Study) -> list[str]:
    """Return a sentence where length-controlled and raw scores give different verdicts; the scorer may be newer."""
    first, second = [*study.arms[:2], "", ""][:2]
    decided = str(study.verdict.get("verdict") or "")
    if not decided or not second:
        return []
    return length_caveats(
        study.deciding.scores,
        metric=study.metric,
        decided=ahead(number(study.verdict.get("difference")), study.arms) if decided == "trade-off" else decided,
        arms=(first, second),
        margin=number(study.verdict.get("margin")) or MARGIN,
        alpha=alpha_of(study.verdict),
    )


def _caveats(study: Study) -> list[str]:
    """Return what stands beside the recommendation."""
    return list(dict.fromkeys([*strings(study.verdict.get("caveats")), *disagreement(study)]))


def _key_facts(study: Study) -> dict[str, str]:
    found = study.verdict
    if not found:
        return {}
    first, second = [*study.arms[:2], "", ""][:2]
    seeds = mapping(found.get("n_seeds"))
    facts = {
        f"{title(first)} − {title(second)}": f"{points(found.get('difference'))} points",
        f"{confidences(found)[0]} interval": interval(found.get("ci95")),
        "Margin that matters": f"±{points(found.get('margin'), signed=False)} points",
        "Decided on": f"{SCORERS.get(study.metric, study.metric)}, {study.split} set",
        "Prompts": f"{found.get('n_prompts') or MISSING}",
        "Seeds": ", ".join(f"{title(str(arm))} {count}" for arm, count in seeds.items()) or MISSING,
        "Smallest difference that can be found": (
            f"{points(found.get('minimum_detectable_difference'), signed=False)} points"
        ),
    }
    return {name: text for name, text in facts.items() if MISSING not in text}


def warnings(study: Study, identity: Mapping[str, Json]) -> list[str]:
    """Collect all warnings, each once; those of the verdict first.

    Args:
        study: the study.
        identity: result of `harness.report.facts.identity_of`.
    """
    found = [str(text) for source in (study.verdict, study.settings) for text in _items(source.get("warnings"))]
    earlier = " ".join(found)
    found += _stale_verdict(study)
    found += [
        f"{title(arm)} scores lower than the SFT base that it started from: {percent(mean)} against {percent(base)}."
        for arm, (mean, base) in below_base(study.verdict).items()
    ]
    found += _unscored_trials(study, earlier)
    found += _definitions_disagree(study)
    if identity.get("status") == "not proved" and "identical data is NOT proved" not in earlier:
        reasons = "; ".join(str(text) for text in _items(identity.get("reasons")))
        found.append(f"identical data is NOT proved: {reasons or 'no reason given'}")
    found += _trial_warnings(study, earlier)
    return list(dict.fromkeys([*found, *study.problems]))


def _stale_verdict(study: Study) -> list[str]:
    """Warn of each arm whose mean in verdict.json differs from that of the deciding runs in this folder."""
    found = []
    unscored = any(number(count) for count in mapping(study.verdict.get("n_unscored")).values())
    for arm, mean in mapping(study.verdict.get("means")).items() if not unscored else ():
        runs = _deciding_means(study, str(arm))
        now, decided = sum(runs) / len(runs) if runs else float("nan"), number(mean)
        if decided is not None and not abs(now - decided) < _SAME_MEAN:
            found.append(
                f"verdict.json is not of these scores: it has a mean of {percent(decided)} for {title(str(arm))}, the "
                f"scores have {percent(now)}; run `python -m harness.decide` on this folder again."
            )
    return found


def _deciding_means(study: Study, arm: str) -> list[float]:
    """Return the mean score of each run of an arm that decides."""
    config = next((config for config in study.configs if config.arm == arm), None)
    if config is None:
        return []
    means = study.run_means(config, study.metric, study.split)
    if study.deciding.looks:
        means = means[means.index.isin(study.deciding.seeds.get(arm, []))]
    return [float(mean) for mean in means]


def _unscored_trials(study: Study, earlier: str) -> list[str]:
    """Warn of failed, diverged and unfinished trials that no earlier warning names, and of runs without scores."""
    found = []
    for state, text in (
        (FAILED, "failed and has no scores (see “Failed trials”)"),
        (DIVERGED, "diverged; its scores are the worst possible, not left out"),
        (UNFINISHED, "is unfinished and has no scores"),
    ):
        for trial in study.trials:
            if trial.state == state and f"{trial.arm} seed {trial.seed} {state}" not in earlier:
                name = f"{title(trial.arm) or 'arm unknown'}, seed {_seed_name(trial.seed)}"
                found.append(f"Trial {trial.trial_id} ({name}) {text}.")
    missing = study.missing_runs() if study.trials else []
    if missing:
        runs = _first_names([f"{title(arm)} seed {seed}" for arm, seed in missing])
        found.append(f"{plural(len(missing), 'registered run')} without scores: {runs}.")
    return found


def _definitions_disagree(study: Study) -> list[str]:
    """Warn where a golden set of pairs alone has another winner by DPO's reward than by SimPO's."""
    pair = study.arms[:2]
    if not study.metric.startswith(PREFERENCE) or len(pair) < 2:
        return []
    gaps = []
    for scorer in DEFINITIONS:
        rows = study.confirmed[study.confirmed["scorer"] == scorer]
        means = rows.groupby("arm")["score"].mean().dropna()
        if not set(pair) <= set(means.index):
            return []
        gaps.append(float(means[pair[0]] - means[pair[1]]))
    if gaps[0] * gaps[1] >= 0:
        return []
    by_dpo, by_simpo = (
        f"{title(pair[0 if gap > 0 else 1])} is ahead by {points(abs(gap), signed=False)} points" for gap in gaps
    )
    return [
        f"The two definitions of preference accuracy disagree about the winner: by DPO's reward {by_dpo}, by SimPO's "
        f"reward {by_simpo}."
    ]


def _trial_warnings(study: Study, earlier: str) -> list[str]:
    """Collect the warnings of the trials; the same text of several trials is one warning."""
    trials: dict[str, list[str]] = {}
    for trial in [*([study.base] if study.base else []), *study.trials]:
        texts = [str(text) for text in _items(trial.manifest.get("warnings")) if str(text) not in earlier]
        flags = [str(flag) for flag in _items(trial.manifest.get("flags")) if flag != DIVERGED]
        texts += [f"the policy {flag}" for flag in flags if f"{trial.arm} seed {trial.seed} {flag}" not in earlier]
        for text in dict.fromkeys(texts):
            trials.setdefault(text, []).append(f"{title(trial.arm)} seed {_seed_name(trial.seed)}")
    return [f"{text} ({_first_names(names)})" for text, names in trials.items()]


def _first_names(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return ", ".join(names[:_MAX_NAMES]) + more


def _seed_name(seed: int | None) -> str:
    return "unknown" if seed is None else str(seed)


def _items(value: Json) -> Sequence[Json]:
    return value if isinstance(value, list) else []
