"""What single prompts say: their differences between the arms, sorted, and the scores of answers by their length."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from harness.figures import WIDE, drawing
from harness.frames import Table, build
from harness.palette import BASE, INK, MUTED, Look, title
from harness.spoken import config_name
from harness.study import Config, Study
from harness.svg import Drawing
from harness.untrusted import cut, one_line
from harness.wording import percent, points

_MOVED = 5  # prompts of each arm in the table
_BINS = 8
_LEAST = 40  # answers, for a curve over lengths


def prompt_differences(study: Study) -> pd.Series:
    """Return the first arm's score minus the second's by prompt, seeds averaged, the largest first; may be empty."""
    if len(study.arms) < 2:
        return pd.Series(dtype=float)
    first, second = (_by_prompt(study, arm) for arm in study.arms[:2])
    found = (first - second).dropna()
    return found.iloc[np.lexsort((found.index.to_numpy(str), -found.to_numpy()))] if len(found) else found


def _by_prompt(study: Study, arm: str) -> pd.Series:
    rows = _rows(study, next((config for config in study.configs if config.arm == arm), None))
    return rows.groupby("prompt_id")["score"].mean()


def _rows(study: Study, config: Config | None) -> pd.DataFrame:
    rows = study.confirmed
    if config is None:
        return rows.iloc[:0]
    mine = rows[(rows["arm"] == config.arm) & (rows["scorer"] == study.metric) & rows["score"].notna()]
    return mine if config.arm == BASE else mine[mine["config"] == config.label]


def draw_prompts(study: Study, looks: Mapping[str, Look]) -> Drawing | None:
    """Draw every prompt's difference, sorted: how many moved, how far, and which way."""
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

    said = (
        f"{title(first)} scores higher on {ahead} of {len(found)} prompts, {title(second)} on {behind}, and they score "
        f"the same on {same}. The mean difference is {points(found.mean())} points."
    )
    caption = (
        f"{title(first)} minus {title(second)} on each prompt, seeds averaged; the same on {same:,}; dashed: the mean."
    )
    return drawing("prompts", "Differences by prompt", said, caption, WIDE, 2.1, draw)


def moved_table(study: Study) -> Table | None:
    """Show the prompts that moved most, each way."""
    found = prompt_differences(study)
    if len(found) < 2:
        return None
    texts = {row["prompt_id"]: row["prompt"] for trial in study.trials for row in study.completions(trial)}
    first, second = (_by_prompt(study, arm) for arm in study.arms[:2])
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
    """Draw the mean score of answers of like length, a line for the base and for each arm."""
    curves = {}
    for config in study.with_base:
        rows = _rows(study, config).dropna(subset=["tokens"])
        if len(rows) >= _LEAST and rows["tokens"].nunique() > 1:
            curves[config_name(study, config)] = (config.arm, _binned(rows))
    if not curves:
        return None

    def draw(figure: Figure) -> None:
        _draw_curves(figure.subplots(), curves, looks, study.split)

    said = " ".join(
        f"{name}: {percent(line['score'].iloc[0])} at {line['tokens'].iloc[0]:.1f} tokens, "
        f"{percent(line['score'].iloc[-1])} at {line['tokens'].iloc[-1]:.1f}."
        for name, (_, line) in curves.items()
    )
    caption = (
        "Mean score of answers of like length (as many in each point, but for ties). Longer answers that score "
        "higher may be better, or may please a judge by their length: see length-controlled scores."
    )
    return drawing("length-scores", "Score by length", said, caption, WIDE, 2.4, draw)


def _draw_curves(
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


def _binned(rows: pd.DataFrame) -> pd.DataFrame:
    """Return mean length and score in bins of about as many answers each; answers of one length stay together."""
    bins = pd.qcut(rows["tokens"], _BINS, labels=False, duplicates="drop")
    return rows.groupby(bins)[["tokens", "score"]].mean()
