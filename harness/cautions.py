"""What a reader must know before believing a verdict: the warnings of the verdict, of the study and of its trials.

Each is one sentence, and each is said once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from harness.frames import run_means
from harness.palette import title
from harness.study import DIVERGED, FAILED, UNFINISHED, Study, mapping
from harness.wording import DEFINITIONS, PREFERENCE, below_base, number, percent, plural, points


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
