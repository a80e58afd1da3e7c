"""Completions side by side: one prompt, what the base and each arm answered, sorted by disagreement."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.checks import failed_checks
from harness.palette import BASE, title
from harness.reader import Reader
from harness.study import Config, Study, Trial
from harness.wording import MISSING, number, percent, plural

MAX_PROMPTS = 40  # shown where no script runs


@dataclass(frozen=True)
class Answer:
    """What one policy answered.

    Attributes:
        score: as the reader sees it; `value` is the number, None where there is none.
        flags: signs of degeneration.
        failed: checks of the prompt that the answer fails.
    """

    arm: str
    text: str
    score: str
    value: float | None
    flags: tuple[str, ...]
    failed: tuple[str, ...]
    tokens: int | None


@dataclass(frozen=True)
class Comparison:
    """One prompt with the answers to it, the base's first."""

    prompt_id: str
    prompt: str
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class SideBySide:
    """All comparisons, those on which the arms disagree most first, and a sentence on them."""

    comparisons: tuple[Comparison, ...]
    summary: str

    @property
    def first(self) -> tuple[Comparison, ...]:
        """Those that are shown where no script runs."""
        return self.comparisons[:MAX_PROMPTS]


@dataclass(frozen=True)
class _Policy:
    """One trial's answers and scores by prompt."""

    arm: str
    seed: int | None
    answers: Mapping[str, Mapping[str, Any]]
    scores: Mapping[str, float]


def side_by_side(study: Study) -> SideBySide:
    """Compare the first seed of each arm (its first config) with each other and with the base."""
    policies = [policy for config in _first_configs(study) if (policy := _policy(study, config))]
    prompts = {prompt: row["prompt"] for policy in policies for prompt, row in policy.answers.items()}
    if not prompts:
        return SideBySide((), "No completions are stored in this study.")
    trained = [policy for policy in policies if policy.arm != BASE]
    ordered = sorted(prompts, key=lambda prompt: (*_disagreement(prompt, trained, policies), prompt))
    checks = _checks(study)
    shown = tuple(
        Comparison(prompt, prompts[prompt], tuple(_answer(policy, prompt, checks) for policy in policies))
        for prompt in ordered
    )
    return SideBySide(shown, _summary(study, len(prompts), trained))


def _checks(study: Study) -> dict[str, list[dict[str, Any]]]:
    """Return the checks of each prompt of the shown split."""
    rows = Reader(study.folder).rows(study.folder / "prompts.jsonl")
    return {
        str(row.get("prompt_id")): row["checks"]
        for row in rows
        if row.get("checks") and row.get("split") == study.split
    }


def _first_configs(study: Study) -> list[Config]:
    """Return the base and the first config of each arm."""
    first: dict[str, Config] = {}
    for config in study.with_base:
        first.setdefault(config.arm, config)
    return list(first.values())


def _policy(study: Study, config: Config) -> _Policy | None:
    trial = next((t for t in config.trials if any(c["split"] == study.split for c in t.completions)), None)
    if trial is None:
        return None
    answers = {row["prompt_id"]: row for row in trial.completions if row["split"] == study.split}
    return _Policy(config.arm, trial.seed, answers, _scores(study, config, trial))


def _scores(study: Study, config: Config, trial: Trial) -> dict[str, float]:
    rows = study.confirmed
    mine = rows[(rows["arm"] == config.arm) & (rows["scorer"] == study.metric)]
    if config.arm != BASE:
        mine = mine[(mine["config"] == config.label) & (mine["seed"] == trial.seed)]
    mine = mine[mine["score"].notna()]
    return dict(zip(mine["prompt_id"], mine["score"], strict=True))


def _disagreement(prompt: str, trained: Sequence[_Policy], policies: Sequence[_Policy]) -> tuple[float, float, bool]:
    """Sort key, largest disagreement first: between the arms, then with the base, then in the text alone."""
    texts = {policy.answers[prompt]["completion"] for policy in trained if prompt in policy.answers}
    return (-_spread(prompt, trained), -_spread(prompt, policies), len(texts) <= 1)


def _spread(prompt: str, policies: Sequence[_Policy]) -> float:
    scores = [policy.scores[prompt] for policy in policies if prompt in policy.scores]
    return max(scores) - min(scores) if scores else 0.0


def _answer(policy: _Policy, prompt: str, checks: Mapping[str, list[dict[str, Any]]]) -> Answer:
    row = policy.answers.get(prompt)
    score = number(policy.scores.get(prompt))
    if row is None:
        return Answer(policy.arm, "", MISSING, None, ("no completion stored",), (), None)
    text = "unscored" if score is None else percent(score, 0)
    flags = tuple(flag.replace("_", " ") for flag in row["flags"])
    failed = _failed(row, checks.get(prompt, []))
    return Answer(policy.arm, row["completion"], text, score, flags, failed, row["tokens"])


def _failed(row: Mapping[str, Any], checks: list[dict[str, Any]]) -> tuple[str, ...]:
    """Return the checks that an answer fails; checks that this version does not know are left out."""
    try:
        return tuple(failed_checks(row["completion"], checks, ended="cut_off" not in row["flags"]))
    except (KeyError, TypeError, AttributeError, re.error):
        return ()


def _summary(study: Study, total: int, trained: Sequence[_Policy]) -> str:
    seeds = ", ".join(f"{title(policy.arm)} seed {policy.seed}" for policy in trained)
    whole = f"All {plural(total, 'prompt')} of the {study.split} set"
    text = f"{whole}, those on which the arms disagree most first ({seeds})."
    if len(trained) < 2:
        return text
    first, second = trained[:2]
    both = first.scores.keys() & second.scores.keys()
    ahead = sum(first.scores[prompt] > second.scores[prompt] for prompt in both)
    behind = sum(first.scores[prompt] < second.scores[prompt] for prompt in both)
    return (
        f"{text} At these seeds {title(first.arm)} scores higher on {ahead:,}, {title(second.arm)} on {behind:,}, and "
        f"they score the same on {len(both) - ahead - behind:,}."
    )


def answers_table(study: Study) -> tuple[list[str], list[list[Any]]]:
    """Return columns and rows of the answers side by side, a prompt in each row, for a table in another program."""
    compared = side_by_side(study).comparisons
    arms = list(dict.fromkeys(answer.arm for one in compared for answer in one.answers))
    columns = ["prompt_id", "prompt", *arms, *(f"{arm} score" for arm in arms)]
    rows = []
    for one in compared:
        found = {answer.arm: answer for answer in one.answers}
        texts = [found[arm].text if arm in found else None for arm in arms]
        rows.append([one.prompt_id, one.prompt, *texts, *(found[arm].value if arm in found else None for arm in arms)])
    return columns, rows
