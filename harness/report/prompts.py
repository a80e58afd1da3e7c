"""Single prompts of a study: differences between the arms, scores by answer length, and answers side by side."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from harness.config.arms import BASE, title
from harness.data.checks import UncheckedError, failed_checks
from harness.decide.words import MISSING, percent, plural, points
from harness.report.figures import WIDE, config_name, drawing
from harness.report.study import Completion, Config, Study, Trial
from harness.report.style import INK, MUTED, Drawing, Look
from harness.report.tables import Table, build
from harness.study.files import Json, Reader, number
from harness.study.text import cut, one_line

MAX_PROMPTS = 40  # shown where no script runs
_MOVED = 5  # prompts of each arm in the table
_BINS = 8
_LEAST_ANSWERS = 40  # for a curve over lengths


def prompt_differences(study: Study) -> pd.Series:
    """Return the first arm's score minus the second's by prompt, mean over seeds, the largest first; may be empty."""
    if len(study.arms) < 2:
        return pd.Series(dtype=float)
    first, second = (_prompt_means(study, arm) for arm in study.arms[:2])
    found = (first - second).dropna()
    return found.iloc[np.lexsort((found.index.to_numpy(str), -found.to_numpy()))] if len(found) else found


def _prompt_means(study: Study, arm: str) -> pd.Series:
    """Return an arm's mean score of each prompt over seeds; unscored answers are left out."""
    config = next((config for config in study.configs if config.arm == arm), Config(arm, "", ()))
    return study.rows_of(config, study.metric).dropna(subset=["score"]).groupby("prompt_id")["score"].mean()


def draw_prompts(study: Study, looks: Mapping[str, Look]) -> Drawing | None:
    """Draw the difference of every prompt, sorted."""
    found = prompt_differences(study)
    if len(found) < 2:
        return None
    first, second = study.arms[:2]
    ahead, behind = int((found > 0).sum()), int((found < 0).sum())
    same = len(found) - ahead - behind

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        place, values = np.arange(len(found)), 100 * found.to_numpy()
        for arm, part in ((first, values > 0), (second, values < 0)):
            axes.fill_between(place, 0, np.where(part, values, 0), step="mid", color=looks[arm].light, alpha=0.7, lw=0)
        axes.axhline(0, color=INK, linewidth=1)
        axes.axhline(values.mean(), color=MUTED, linewidth=1, linestyle="--")
        axes.set(xlim=(-0.5, len(found) - 0.5), xlabel="prompts, sorted", ylabel="points")
        axes.set_title(f"{looks[first].glyph} {title(first)} better on {ahead:,}", loc="left", color=looks[first].light)
        axes.set_title(f"{looks[second].glyph} {title(second)} on {behind:,}", loc="right", color=looks[second].light)

    alt_text = (
        f"{title(first)} scores higher on {ahead} of {len(found)} prompts, {title(second)} on {behind}, and they score "
        f"the same on {same}. The mean difference is {points(found.mean())} points."
    )
    caption = (
        f"{title(first)} minus {title(second)} on each prompt, seeds averaged; the same on {same:,}; dashed: the mean."
    )
    return drawing("prompts", "Differences by prompt", alt_text, caption, WIDE, 2.1, draw)


def moved_table(study: Study) -> Table | None:
    """Show the prompts with the largest differences in each direction."""
    found = prompt_differences(study)
    if len(found) < 2:
        return None
    texts = {row["prompt_id"]: row["prompt"] for trial in study.trials for row in study.completions(trial)}
    first, second = (_prompt_means(study, arm) for arm in study.arms[:2])
    ends = [*found.index[:_MOVED], *(name for name in found.index[::-1][:_MOVED] if name not in found.index[:_MOVED])]
    rows = {
        name: {
            "Prompt": one_line(cut(str(texts.get(name, "")), 160)) or "–",
            study.arms[0]: percent(first[name], 0),
            study.arms[1]: percent(second[name], 0),
            "Difference": points(found[name]),
        }
        for name in ends
        if found[name] != 0
    }
    if not rows:
        return None
    arms = {arm: arm for arm in study.arms[:2]}
    return build("The prompts that moved most, seeds averaged", "Prompt id", rows, arms)


def draw_length_scores(study: Study, looks: Mapping[str, Look]) -> Drawing | None:
    """Draw the mean score of answers of similar length: one line for the base and for each arm."""
    curves = {}
    for config in study.with_base:
        rows = study.rows_of(config, study.metric).dropna(subset=["score", "tokens"])
        if len(rows) >= _LEAST_ANSWERS and rows["tokens"].nunique() > 1:
            curves[config_name(study, config)] = (config.arm, _means_by_length(rows))
    if not curves:
        return None

    def draw(figure: Figure) -> None:
        _draw_length_curves(figure.subplots(), curves, looks, study.split)

    alt_text = " ".join(
        f"{name}: {percent(line['score'].iloc[0])} at {line['tokens'].iloc[0]:.1f} tokens, "
        f"{percent(line['score'].iloc[-1])} at {line['tokens'].iloc[-1]:.1f}."
        for name, (_, line) in curves.items()
    )
    caption = (
        "Mean score of answers of like length (as many in each point, but for ties). Longer answers that score "
        "higher may be better, or may please a judge by their length: see length-controlled scores."
    )
    return drawing("length-scores", "Score by length", alt_text, caption, WIDE, 2.4, draw)


def _draw_length_curves(
    axes: Axes, curves: Mapping[str, tuple[str, pd.DataFrame]], looks: Mapping[str, Look], split: str
) -> None:
    for name, (arm, line) in curves.items():
        look = looks[arm]
        axes.plot(
            line["tokens"],
            100 * line["score"],
            color=look.light,
            marker=look.marker,
            markersize=4,
            linestyle=look.dash,
            label=name,
        )
    axes.set(xlabel=f"tokens of a completion on {split}", ylabel="mean score, %")
    axes.legend(fontsize=8)


def _means_by_length(rows: pd.DataFrame) -> pd.DataFrame:
    """Return mean length and score in bins of about equal counts; answers of one length stay together."""
    bins = pd.qcut(rows["tokens"], _BINS, labels=False, duplicates="drop")
    return rows.groupby(bins)[["tokens", "score"]].mean()


@dataclass(frozen=True)
class Answer:
    """One policy's answer to a prompt.

    Attributes:
        score: as text; `value` is the number, None where there is none.
        flags: signs of degeneration.
        failed: the prompt's checks that the answer fails.
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
        """The comparisons that are shown where no script runs."""
        return self.comparisons[:MAX_PROMPTS]


@dataclass(frozen=True)
class _Policy:
    """One trial's answers and scores by prompt."""

    arm: str
    seed: int | None
    answers: Mapping[str, Completion]
    scores: Mapping[str, float]


def side_by_side(study: Study) -> SideBySide:
    """Compare the first seed of each arm (its first config) with each other and with the base."""
    policies = [policy for config in _first_configs(study) if (policy := _policy(study, config))]
    prompts = {prompt: row["prompt"] for policy in policies for prompt, row in policy.answers.items()}
    if not prompts:
        return SideBySide((), "No completions are stored in this study.")
    trained = [policy for policy in policies if policy.arm != BASE]
    ordered = sorted(prompts, key=lambda prompt: (*_sort_key(prompt, trained, policies), prompt))
    checks = _checks_by_prompt(study)
    shown = tuple(
        Comparison(prompt, prompts[prompt], tuple(_answer_of(policy, prompt, checks) for policy in policies))
        for prompt in ordered
    )
    return SideBySide(shown, _summary(study, len(prompts), trained))


def _checks_by_prompt(study: Study) -> dict[str, list[Mapping[str, Json]]]:
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
    return _Policy(config.arm, trial.seed, answers, _scores_of_trial(study, config, trial))


def _scores_of_trial(study: Study, config: Config, trial: Trial) -> dict[str, float]:
    rows = study.rows_of(config, study.metric).dropna(subset=["score"])
    if config.arm != BASE:
        rows = rows[rows["seed"] == trial.seed]
    return dict(zip(rows["prompt_id"], rows["score"], strict=True))


def _sort_key(prompt: str, trained: Sequence[_Policy], policies: Sequence[_Policy]) -> tuple[float, float, bool]:
    """Return a key that sorts the largest disagreement first: between the arms, then with the base, then in text."""
    texts = {policy.answers[prompt]["completion"] for policy in trained if prompt in policy.answers}
    return (-_score_range(prompt, trained), -_score_range(prompt, policies), len(texts) <= 1)


def _score_range(prompt: str, policies: Sequence[_Policy]) -> float:
    scores = [policy.scores[prompt] for policy in policies if prompt in policy.scores]
    return max(scores) - min(scores) if scores else 0.0


def _answer_of(policy: _Policy, prompt: str, checks: Mapping[str, list[Mapping[str, Json]]]) -> Answer:
    row = policy.answers.get(prompt)
    score = number(policy.scores.get(prompt))
    if row is None:
        return Answer(policy.arm, "", MISSING, None, ("no completion stored",), (), None)
    text = "unscored" if score is None else percent(score, 0)
    flags = tuple(flag.replace("_", " ") for flag in row["flags"])
    failed = _failed_checks(row, checks.get(prompt, []))
    return Answer(policy.arm, row["completion"], text, score, flags, failed, row["tokens"])


def _failed_checks(row: Completion, checks: Sequence[Mapping[str, Json]]) -> tuple[str, ...]:
    """Return the checks that an answer fails; none where a check is unknown or malformed."""
    try:
        return tuple(failed_checks(row["completion"], checks, ended="cut_off" not in row["flags"]))
    except (KeyError, TypeError, AttributeError, re.error, UncheckedError):
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


def answers_table(study: Study) -> tuple[list[str], list[list[str | float | None]]]:
    """Return columns and rows of the answers side by side, one prompt per row, for a table in another program."""
    compared = side_by_side(study).comparisons
    arms = list(dict.fromkeys(answer.arm for one in compared for answer in one.answers))
    columns = ["prompt_id", "prompt", *arms, *(f"{arm} score" for arm in arms)]
    rows: list[list[str | float | None]] = []
    for one in compared:
        found = {answer.arm: answer for answer in one.answers}
        texts = [found[arm].text if arm in found else None for arm in arms]
        rows.append([one.prompt_id, one.prompt, *texts, *(found[arm].value if arm in found else None for arm in arms)])
    return columns, rows
