"""What a report says in sentences: headline, meaning of the level, next step, warnings; and how it writes numbers.

Rates are in [0, 1] in files; percent and points appear here and nowhere before.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from harness.palette import title
from harness.study import DIVERGED, FAILED, UNFINISHED, Study, mapping

MISSING = "–"
PREFERENCE = "preference_accuracy"
LEVELS = {
    "checkpoint": "Checkpoint level: this compares the trained models at hand, with one seed for at least one arm. It "
    "does not say which method is better; another seed may turn it round.",
    "method": "Method level: the interval counts the differences between seeds as well as those between prompts, so it "
    "speaks of the methods with these settings on this data, not of one lucky run.",
}
DEFINITIONS = {
    f"{PREFERENCE}_sum": "by DPO's reward (summed log-ratio to the base)",
    f"{PREFERENCE}_mean": "by SimPO's reward (mean log-prob)",
}
SCORERS = {
    "checks": "All checks passed",
    "checks_fraction": "Share of checks passed",
    PREFERENCE: "Preference accuracy, mean of both definitions",
    **{scorer: f"Preference accuracy {text}" for scorer, text in DEFINITIONS.items()},
}


def number(value: Any) -> float | None:
    """Return a finite number, or None for anything else that a file may hold."""
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable else None


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


def bounds(value: Any) -> tuple[float, float] | None:
    """Return the two ends of an interval, or None where there is none."""
    ends = [number(end) for end in value] if isinstance(value, list | tuple) else []
    return (ends[0], ends[1]) if len(ends) == 2 and ends[0] is not None and ends[1] is not None else None


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
        "95% interval": interval(verdict.get("ci95")),
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
    winner = title(verdict)
    if not verdict:
        return "Finish the sweep: running the same command again does what is missing and repeats nothing."
    if verdict == "tie":
        return (
            f"Ship either: the difference is smaller than the {points(study.verdict.get('margin'), signed=False)} "
            "points that matter. Let cost, answer length and the side-by-side completions below decide."
        )
    if verdict == "trade-off":
        failed = listing(str(guard.get("metric")) for guard in guards(study) if guard_failed(guard))
        return (
            f"Do not ship {title(_ahead(study))} before you have looked at the guard that it fails"
            f"{f' ({failed})' if failed else ''}: decide which of the two matters more."
        )
    if verdict == "inconclusive":
        return _more_evidence(study)
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


def warnings(study: Study, identity: Mapping[str, Any]) -> list[str]:
    """Collect what a reader must know before believing the verdict, each sentence once."""
    found = [str(text) for source in (study.verdict, study.settings) for text in _list(source.get("warnings"))]
    found += _outcomes(study)
    found += _preference_warnings(study)
    if identity.get("status") == "not proved":
        reasons = "; ".join(str(text) for text in _list(identity.get("reasons")))
        found.append(f"Identical data is NOT proved: {reasons or 'no reason given'}.")
    found += _manifest_warnings(study)
    found += list(study.problems)
    return list(dict.fromkeys(found))


def preference_by_definition(study: Study) -> dict[str, dict[str, float]]:
    """Return the mean held-out preference accuracy `{scorer: {arm: mean}}` by each definition, on the shown split."""
    rows = study.confirmed
    result = {}
    for scorer in DEFINITIONS:
        means = rows[rows["scorer"] == scorer].groupby("arm")["score"].mean().dropna()
        result[scorer] = {arm: float(means[arm]) for arm in study.arms if arm in means.index}
    return result


def _preference_warnings(study: Study) -> list[str]:
    if not study.metric.startswith(PREFERENCE):
        return []
    found = []
    means = preference_by_definition(study)
    pair = study.arms[:2]
    if len(pair) == 2 and all(set(pair) <= set(row) for row in means.values()):
        gaps = {scorer: row[pair[0]] - row[pair[1]] for scorer, row in means.items()}
        (sum_gap, mean_gap) = gaps.values()
        if sum_gap * mean_gap < 0:
            by_sum, by_mean = (pair[0], pair[1]) if sum_gap > 0 else (pair[1], pair[0])
            by_dpo, by_simpo = (points(abs(gap), signed=False) for gap in (sum_gap, mean_gap))
            found.append(
                "The two definitions of preference accuracy disagree about the winner: by DPO's reward "
                f"{title(by_sum)} is ahead by {by_dpo} points, by SimPO's reward {title(by_mean)} by {by_simpo}."
            )
    return found


def _outcomes(study: Study) -> list[str]:
    found = []
    for state, text in (
        (FAILED, "failed and has no scores (see “Failed trials”)"),
        (DIVERGED, "diverged; its scores are the worst possible, not left out"),
        (UNFINISHED, "is unfinished and has no scores"),
    ):
        for trial in study.trials:
            if trial.state == state:
                found.append(
                    f"Trial {trial.trial_id} ({title(trial.arm) or 'arm unknown'}, seed {_seed(trial.seed)}) {text}."
                )
    missing = study.missing_runs() if study.trials else []
    if missing:
        runs = ", ".join(f"{title(arm)} seed {seed}" for arm, seed in missing[:10])
        found.append(
            f"{plural(len(missing), 'registered run')} without scores: {runs}{' …' if len(missing) > 10 else ''}."
        )
    return found


def _manifest_warnings(study: Study) -> list[str]:
    """Collect the trials' own warnings; the same text of many trials is one warning."""
    trials: dict[str, list[str]] = {}
    for trial in [*([study.base] if study.base else []), *study.trials]:
        texts = [str(text) for text in _list(trial.manifest.get("warnings"))]
        texts += [f"the policy {flag}" for flag in _list(trial.manifest.get("flags")) if flag != DIVERGED]
        for text in dict.fromkeys(texts):
            trials.setdefault(text, []).append(f"{title(trial.arm)} seed {_seed(trial.seed)}")
    return [f"{text} ({_some(names)})" for text, names in trials.items()]


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _more_evidence(study: Study) -> str:
    text = "Ship neither on this evidence: add seeds or golden prompts."
    if _detectable(study) != MISSING:
        text += f" As it is, only differences of about {_detectable(study)} points or more can be found."
    counts = mapping(study.verdict.get("n_seeds"))
    seeds = listing(f"{count} of {title(str(arm))}" for arm, count in counts.items())
    prompts = number(study.verdict.get("n_prompts"))
    if prompts and seeds:
        text += f" Now: {plural(int(prompts), 'prompt')}; seeds: {seeds}."
    return text


def _detectable(study: Study) -> str:
    return points(study.verdict.get("minimum_detectable_difference"), signed=False)


def _verdict(study: Study) -> tuple[str, str, str]:
    first, second = [*study.arms[:2], "", ""][:2]
    return str(study.verdict.get("verdict") or ""), first, second


def _ahead(study: Study) -> str:
    _, first, second = _verdict(study)
    return first if (number(study.verdict.get("difference")) or 0.0) >= 0 else second


def _seed(seed: int | None) -> str:
    return "unknown" if seed is None else str(seed)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
