"""What a report says in sentences: headline, meaning of the level, next step; and how it writes numbers.

Rates are in [0, 1] in files; percent and points appear here and nowhere before.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from harness.config.arms import title
from harness.decide.lines import confidence
from harness.decide.rule import verdict
from harness.report.study import DIVERGED, FAILED, UNFINISHED, Study, run_means
from harness.score.scorers import SCORERS as TABLE
from harness.study.errors import UsageError
from harness.study.files import bounds, mapping, number
from harness.study.registration import ALPHA, MARGIN

MISSING = "–"
PREFERENCE = "preference_accuracy"
LEVELS = {
    "checkpoint": "Checkpoint level: this compares the trained models at hand, with one seed for at least one arm. It "
    "does not say which method is better; another seed may turn it round.",
    "method": "Method level: the interval counts the differences between seeds as well as those between prompts, so it "
    "speaks of the methods with these settings on this data, not of one lucky run.",
}
DEFINITIONS = {f"{PREFERENCE}_sum": "DPO's reward", f"{PREFERENCE}_mean": "SimPO's reward"}
SCORERS = {name: scorer.title for name, scorer in TABLE.items()}


def percent(value: Any, digits: int = 1) -> str:
    """Write a rate as percent."""
    rate = number(value)
    return MISSING if rate is None else f"{100 * rate:.{digits}f}%"


def points(value: Any, *, signed: bool = True) -> str:
    """Write a difference of rates in percentage points, with a real minus sign."""
    rate = number(value)
    if rate is None:
        return MISSING
    text = f"{100 * rate:+.1f}" if signed else f"{100 * rate:.1f}"
    return text.replace("-", "−") if float(text) else "0.0"


def interval(value: Any) -> str:
    """Write an interval of differences in percentage points."""
    ends = bounds(value)
    return MISSING if ends is None else f"{points(ends[0])} to {points(ends[1])}"


def levels(study: Study) -> tuple[str, str]:
    """Name the confidence of `ci95` and of `ci90`, which are at 1 - alpha and 1 - 2 * alpha whatever alpha is."""
    alpha = number(study.verdict.get("alpha"))
    alpha = ALPHA if alpha is None else alpha
    return confidence(alpha), confidence(2 * alpha)


def listing(items: Iterable[str]) -> str:
    """Join words: `a, b and c`."""
    words = list(items)
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def plural(count: int, noun: str, nouns: str | None = None) -> str:
    """Write a count with its noun."""
    return f"{count:,} {noun if count == 1 else nouns or noun + 's'}"


def headline(study: Study) -> str:
    """Say the verdict in a few words; of one seed an arm it never says that the method is better."""
    verdict, first, second = _verdict(study)
    if not verdict:
        return "No verdict yet"
    if verdict in ("tie", "inconclusive", "trade-off"):
        trade = f"Trade-off: {title(_ahead(study))} scores better and fails a guard"
        return {"tie": "Tie", "inconclusive": "Inconclusive: not enough evidence", "trade-off": trade}[verdict]
    other = second if verdict == first else first
    if study.verdict.get("level") == "checkpoint":
        return f"This {title(verdict)} checkpoint beats this {title(other)} checkpoint"
    return f"{title(verdict)} beats {title(other)}"


def reason(study: Study) -> str:
    """Return the verdict's sentence, or how far the study has come."""
    if study.verdict:
        return str(study.verdict.get("reason") or "The verdict gives no reason.")
    done = sum(trial.scored for trial in study.trials)
    if not study.trials:
        return "No trial has been run in this study."
    return (
        f"{done} of {plural(len(study.trials), 'started trial')} {'is' if done == 1 else 'are'} scored, and the "
        "decision has not been made; run the sweep's command again, or `python -m harness.decide` on this folder."
    )


def key_facts(study: Study) -> dict[str, str]:
    """Return the verdict's numbers, `{name: text}`."""
    verdict, first, second = study.verdict, *_verdict(study)[1:]
    if not verdict:
        return {}
    seeds = mapping(verdict.get("n_seeds"))
    found = {
        f"{title(first)} − {title(second)}": f"{points(verdict.get('difference'))} points",
        f"{levels(study)[0]} interval": interval(verdict.get("ci95")),
        "Margin that matters": f"±{points(verdict.get('margin'), signed=False)} points",
        "Decided on": f"{SCORERS.get(study.metric, study.metric)}, {study.split} set",
        "Prompts": f"{verdict.get('n_prompts') or MISSING}",
        "Seeds": ", ".join(f"{title(str(arm))} {count}" for arm, count in seeds.items()) or MISSING,
        "Smallest difference that can be found": f"{_detectable(study)} points",
    }
    return {name: text for name, text in found.items() if MISSING not in text}


def next_step(study: Study) -> str:
    """Say what to do with the verdict."""
    verdict = _verdict(study)[0]
    if not verdict:
        return "Finish the sweep: running the same command again does what is missing and repeats nothing."
    worse = below_base(study)
    if verdict in worse or (worse and worse.keys() == set(study.arms[:2])):
        each = listing(
            f"{title(arm)} scores {percent(mean)}, the base {percent(base)}" for arm, (mean, base) in worse.items()
        )
        return f"Ship the SFT base: {each}. Look at the learning rate and at the pairs before you train again."
    advice = {"tie": _either, "trade-off": _trade_off, "inconclusive": _more_evidence}.get(verdict, _ship)
    return advice(study)


def _either(study: Study) -> str:
    margin = points(study.verdict.get("margin"), signed=False)
    return (
        f"Ship either: the difference is smaller than the {margin} points that matter. Let cost, answer length and the "
        "side-by-side completions below decide."
    )


def _trade_off(study: Study) -> str:
    failed = listing(str(guard.get("metric")) for guard in guards(study) if guard_failed(guard))
    return (
        f"Do not ship {title(_ahead(study))} before you have looked at the guard that it fails"
        f"{f' ({failed})' if failed else ''}: decide which of the two matters more."
    )


def _ship(study: Study) -> str:
    winner = title(_verdict(study)[0])
    if study.verdict.get("level") == "checkpoint":
        return (
            f"If one of these two models must be shipped today, ship the {winner} one. To choose the method, train "
            "both arms with at least 3 seeds (`seed=1,2,3`)."
        )
    return f"Ship {winner}. Read the completions below first: a score is no substitute for looking."


def guards(study: Study) -> list[Mapping[str, Any]]:
    """Return the guards of the verdict."""
    rows = study.verdict.get("guards")
    return [row for row in rows if isinstance(row, Mapping)] if isinstance(rows, list) else []


def guard_failed(guard: Mapping[str, Any]) -> bool:
    """Say whether a guard is known to have failed."""
    return guard.get("passed") is False


def _more_evidence(study: Study) -> str:
    text = "Ship neither on this evidence."
    settle = mapping(study.verdict.get("to_settle"))
    seeds, prompts = number(settle.get("seeds")), number(settle.get("prompts"))
    ways = [f"about {seeds:,.0f} seeds an arm"] if seeds else []
    ways += [f"about {prompts:,.0f} golden prompts"] if prompts else []
    margin = points(study.verdict.get("margin"), signed=False)
    if ways:
        text += f" A difference of {margin} points would be found with {' or '.join(ways)}, all else as it is."
    elif settle:
        text += f" Neither more seeds nor more prompts alone would find a difference of {margin} points: add both."
    else:
        text += " Add seeds or golden prompts."
    if study.verdict.get("level") == "checkpoint":
        text += " At checkpoint level that is about these two models; for the methods, train at least 3 seeds an arm."
    return text


def below_base(study: Study) -> dict[str, tuple[float, float]]:
    """Return the arms that the verdict has below the SFT base: `{arm: (its mean, the base's mean)}`."""
    base = number(study.verdict.get("base_mean"))
    means = {str(arm): number(mean) for arm, mean in mapping(study.verdict.get("means")).items()}
    return {arm: (mean, base) for arm, mean in means.items() if base is not None and mean is not None and mean < base}


def _detectable(study: Study) -> str:
    return points(study.verdict.get("minimum_detectable_difference"), signed=False)


def _verdict(study: Study) -> tuple[str, str, str]:
    first, second = [*study.arms[:2], "", ""][:2]
    return str(study.verdict.get("verdict") or ""), first, second


def _ahead(study: Study) -> str:
    _, first, second = _verdict(study)
    return first if (number(study.verdict.get("difference")) or 0.0) >= 0 else second


def warnings(study: Study, identity: Mapping[str, Any]) -> list[str]:
    """Collect all warnings; those of the verdict first."""
    found = [str(text) for source in (study.verdict, study.settings) for text in _list(source.get("warnings"))]
    said = " ".join(found)
    found += _stale_verdict(study)
    found += [
        f"{title(arm)} scores lower than the SFT base that it started from: {percent(mean)} against {percent(base)}."
        for arm, (mean, base) in below_base(study).items()
    ]
    found += _outcomes(study, said)
    found += _disagreement(study)
    if identity.get("status") == "not proved" and "identical data is NOT proved" not in said:
        reasons = "; ".join(str(text) for text in _list(identity.get("reasons")))
        found.append(f"identical data is NOT proved: {reasons or 'no reason given'}")
    found += _manifest_warnings(study, said)
    return list(dict.fromkeys([*found, *study.problems]))


def _stale_verdict(study: Study) -> list[str]:
    """Warn of each arm whose mean in verdict.json is not that of the scores in this folder."""
    found = []
    unscored = any(number(count) for count in mapping(study.verdict.get("n_unscored")).values())
    for arm, mean in mapping(study.verdict.get("means")).items() if not unscored else ():
        config = next((config for config in study.configs if config.arm == arm), None)
        runs = run_means(study, config, study.metric, study.split) if config else pd.Series(dtype=float)
        now, said = float(runs.mean()), number(mean)
        if said is not None and not abs(now - said) < 1e-6:
            found.append(
                f"verdict.json is not of these scores: it has a mean of {percent(said)} for {title(str(arm))}, the "
                f"scores have {percent(now)}; run `python -m harness.decide` on this folder again."
            )
    return found


def _outcomes(study: Study, said: str) -> list[str]:
    found = []
    for state, text in (
        (FAILED, "failed and has no scores (see “Failed trials”)"),
        (DIVERGED, "diverged; its scores are the worst possible, not left out"),
        (UNFINISHED, "is unfinished and has no scores"),
    ):
        for trial in study.trials:
            if trial.state == state and f"{trial.arm} seed {trial.seed} {state}" not in said:
                name = f"{title(trial.arm) or 'arm unknown'}, seed {_seed(trial.seed)}"
                found.append(f"Trial {trial.trial_id} ({name}) {text}.")
    missing = study.missing_runs() if study.trials else []
    if missing:
        runs = _some([f"{title(arm)} seed {seed}" for arm, seed in missing])
        found.append(f"{plural(len(missing), 'registered run')} without scores: {runs}.")
    return found


def _disagreement(study: Study) -> list[str]:
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


def _manifest_warnings(study: Study, said: str) -> list[str]:
    """Collect the trials' own warnings; the same text of many trials is one warning."""
    trials: dict[str, list[str]] = {}
    for trial in [*([study.base] if study.base else []), *study.trials]:
        texts = [str(text) for text in _list(trial.manifest.get("warnings")) if str(text) not in said]
        flags = [str(flag) for flag in _list(trial.manifest.get("flags")) if flag != DIVERGED]
        texts += [f"the policy {flag}" for flag in flags if f"{trial.arm} seed {trial.seed} {flag}" not in said]
        for text in dict.fromkeys(texts):
            trials.setdefault(text, []).append(f"{title(trial.arm)} seed {_seed(trial.seed)}")
    return [f"{text} ({_some(names)})" for text, names in trials.items()]


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _seed(seed: int | None) -> str:
    return "unknown" if seed is None else str(seed)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


CONTROLLED = "length_controlled"
_RAW = ("judge", "reward_model")  # scorers that a length-controlled one is made of


def disagreement(study: Study) -> str:
    """Return a sentence where the other of the two kinds of score gives another verdict; empty where it does not."""
    other = _other(study)
    decided = str(study.verdict.get("verdict") or "")
    if not other or not decided or len(study.arms) < 2:
        return ""
    first, second = study.arms[:2]
    try:
        found = verdict(
            study.scores,
            metric=other,
            margin=number(study.verdict.get("margin")) or MARGIN,
            alpha=number(study.verdict.get("alpha")) or ALPHA,
            arms=(first, second),
        )
    except UsageError:
        return ""
    if found["verdict"] == decided:
        return ""
    kinds = ("length-controlled", "raw") if other.startswith(CONTROLLED) else ("raw", "length-controlled")
    return (
        f"The {kinds[0]} scores ({other}) say otherwise than the {kinds[1]} ones that decide: {found['verdict']}, "
        f"{title(first)} minus {title(second)} {points(found['difference'])} points, "
        f"{levels(study)[0]} {interval(found['ci95'])}. "
        "The verdict depends on whether length counts."
    )


def _other(study: Study) -> str:
    names = [str(name) for name in study.scores["scorer"].unique()]
    if study.metric.startswith(CONTROLLED):
        return next((name for name in names if name in _RAW), "")
    return next((name for name in names if name.startswith(CONTROLLED)), "")
