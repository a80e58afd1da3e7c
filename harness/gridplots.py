"""Figures of a search: dev scores of all configs, maps over two hyperparameters, the expected best of n configs."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from harness.figures import PANEL, WIDE, drawing
from harness.palette import INK, PAPER, Look, title
from harness.sensitivity import Tried, expected_best, tried_configs
from harness.study import Study
from harness.svg import Drawing
from harness.untrusted import one_line
from harness.wording import SCORERS, listing, percent

_MAPS = (("beta", "gamma_beta_ratio"), ("lr", "beta"))  # (across, down)
_NAMES = {"beta": "β", "gamma_beta_ratio": "γ/β", "lr": "learning rate"}
_COLOURS = "cividis"  # lightness rises evenly, also for those who see few colours


def draw_search(study: Study, looks: Mapping[str, Look]) -> list[Drawing]:
    """Draw what the tuning stage found; nothing where no arm has several configs."""
    tried = tried_configs(study)
    if not tried:
        return []
    metric = SCORERS.get(study.metric, one_line(study.metric, 40))
    maps = [
        found for arm, configs in tried.items() for pair in _MAPS if (found := _draw_map(configs, pair, looks[arm]))
    ]
    return [_draw_spread(tried, metric, looks), *maps, _draw_expected(tried, metric, looks)]


def _draw_spread(tried: Mapping[str, Sequence[Tried]], metric: str, looks: Mapping[str, Look]) -> Drawing:
    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for row, (arm, configs) in enumerate(tried.items()):
            heights = row + 0.5 * (np.arange(len(configs)) / max(1, len(configs) - 1) - 0.5)
            for config, height in zip(configs, heights, strict=True):
                marker = "x" if config.ruined else looks[arm].marker
                edge = INK if config.selected else looks[arm].light
                size = 10 if config.selected else 6
                axes.plot(
                    100 * config.mean, height, marker, color=looks[arm].light, markeredgecolor=edge, markersize=size
                )
        axes.set(
            yticks=range(len(tried)),
            yticklabels=[f"{looks[a].glyph} {title(a)}" for a in tried],
            ylim=(len(tried) - 0.5, -0.5),
        )
        axes.set_xlabel(f"{metric} on dev, %")
        axes.margins(x=0.05)

    said = " ".join(_say(arm, configs) for arm, configs in tried.items())
    caption = (
        "A point is a config's mean over the tuning seeds; a cross collapsed or diverged; the large one was selected."
    )
    return drawing("search-spread", "Dev scores of all configs", said, caption, WIDE, 0.55 * len(tried) + 0.9, draw)


def _say(arm: str, configs: Sequence[Tried]) -> str:
    means = [config.mean for config in configs]
    ruined = sum(config.ruined for config in configs)
    chosen = next((config for config in configs if config.selected), None)
    selected = f"; selected: {chosen.label} with {percent(chosen.mean)}" if chosen else ""
    return (
        f"{title(arm)}: {len(configs)} configs from {percent(min(means))} to {percent(max(means))}, "
        f"{ruined} collapsed or diverged{selected}."
    )


def _draw_map(configs: Sequence[Tried], keys: tuple[str, str], look: Look) -> Drawing | None:
    """Draw the best dev mean at each pair of values; None unless both keys vary."""
    across, down = (sorted({c.values[key] for c in configs if key in c.values}) for key in keys)
    if len(across) < 2 or len(down) < 2:
        return None
    if len(across) * len(down) > 4 * len(configs):  # random samples: no two configs share a value
        return None
    best: dict[tuple[float, float], Tried] = {}
    for config in configs:
        place = (config.values[keys[0]], config.values[keys[1]])
        best[place] = max(best.get(place, config), config, key=lambda one: one.mean)
    others = sorted(
        {key for c in configs for key in c.values if key not in keys and len({o.values.get(key) for o in configs}) > 1}
    )
    names = [_NAMES.get(key, key) for key in keys]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.grid(visible=False)
        _fill(axes, across, down, best)
        axes.set(xticks=range(len(across)), xticklabels=[f"{v:g}" for v in across], xlabel=names[0])
        axes.set(yticks=range(len(down)), yticklabels=[f"{v:g}" for v in down], ylabel=names[1])
        axes.set_title(f"{look.glyph} {look.title}", loc="left", color=look.light)

    cells = "; ".join(
        f"{names[0]} {x:g}, {names[1]} {y:g}: {percent(one.mean)}{' (selected)' if one.selected else ''}"
        for (x, y), one in sorted(best.items())
    )
    over = f" Each cell is the best over {listing(_NAMES.get(key, key) for key in others)}." if others else ""
    caption = f"{look.title}: mean dev score in percent; the frame marks the selected config.{over}"
    name = "map-" + re.sub(r"[^a-z0-9]+", "-", f"{look.key}-{keys[0]}-{keys[1]}")
    heading = f"{look.title}: dev score by {names[0]} and {names[1]}"
    return drawing(name, heading, cells, caption, PANEL, 0.42 * len(down) + 1.0, draw)


def _fill(
    axes: Axes, across: Sequence[float], down: Sequence[float], best: Mapping[tuple[float, float], Tried]
) -> None:
    grid = np.array([[best[x, y].mean if (x, y) in best else math.nan for x in across] for y in down])
    low, high = np.nanmin(grid), np.nanmax(grid)
    colours = mpl.colormaps[_COLOURS]
    for row, y in enumerate(down):
        for column, x in enumerate(across):
            one = best.get((x, y))
            if one is None:
                continue
            share = (one.mean - low) / (high - low) if high > low else 0.5
            axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=colours(share), edgecolor=PAPER))
            ink = "#000000" if share > 0.55 else "#fffffe"  # not the page's own colours: cells keep theirs in the dark
            mark = " ×" if one.ruined else ""
            axes.text(column, row, f"{100 * one.mean:.1f}{mark}", ha="center", va="center", color=ink, fontsize=8)
            if one.selected:
                axes.add_patch(
                    Rectangle((column - 0.46, row - 0.46), 0.92, 0.92, fill=False, edgecolor=ink, linewidth=2)
                )
    axes.set(xlim=(-0.5, len(across) - 0.5), ylim=(-0.5, len(down) - 0.5))


def _draw_expected(tried: Mapping[str, Sequence[Tried]], metric: str, looks: Mapping[str, Look]) -> Drawing:
    curves = {arm: expected_best([config.mean for config in configs]) for arm, configs in tried.items()}

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for arm, curve in curves.items():
            style: dict[str, Any] = {
                "color": looks[arm].light,
                "marker": looks[arm].marker,
                "linestyle": looks[arm].dash,
            }
            axes.plot(range(1, len(curve) + 1), 100 * np.array(curve), label=title(arm), markersize=4, **style)
        axes.set(xlabel="configs tried", ylabel=f"{metric} on dev, %")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(frameon=False)

    said = " ".join(
        f"{title(arm)}: {percent(curve[0])} with one config, {percent(curve[-1])} with {len(curve)}."
        for arm, curve in curves.items()
    )
    caption = (
        "Expected best dev score of n configs drawn from those that were tried (unbiased, up to half of them; Tang et "
        "al. 2020). It describes this search and tests nothing."
    )
    return drawing("search-expected", "Expected best of n configs", said, caption, PANEL, 2.4, draw)
