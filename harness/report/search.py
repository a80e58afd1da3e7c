"""The hyperparameter search of a study: dev scores of all configs -> figures, maps, and a table of sensitivity."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from harness.config.arms import BASE, title
from harness.decide.words import listing, percent, plural, points
from harness.report.figures import PANEL, WIDE, drawing
from harness.report.study import DIVERGED, FAILED, Config, Study
from harness.report.style import INK, PAPER, SCORERS, Drawing, Look
from harness.report.tables import Table, build, columns
from harness.study.files import Json, mapping, strings
from harness.study.text import one_line

_MAPS = (("beta", "gamma_beta_ratio"), ("lr", "beta"))  # (across, down)
_KEY_TITLES = {"beta": "β", "gamma_beta_ratio": "γ/β", "lr": "learning rate"}
_COLOURS = "cividis"  # lightness rises evenly, also for those who see few colours


def draw_search(study: Study, looks: Mapping[str, Look]) -> list[Drawing]:
    """Draw the results of the tuning stage; nothing where no arm has several configs."""
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

    alt_text = " ".join(_spread_alt_text(arm, configs) for arm, configs in tried.items())
    caption = (
        "A point is a config's mean over the tuning seeds; a cross collapsed or diverged; the large one was selected."
    )
    return drawing("search-spread", "Dev scores of all configs", alt_text, caption, WIDE, 0.55 * len(tried) + 0.9, draw)


def _spread_alt_text(arm: str, configs: Sequence[Tried]) -> str:
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
    names = [_KEY_TITLES.get(key, key) for key in keys]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.grid(visible=False)
        _fill_map(axes, across, down, best)
        axes.set(xticks=range(len(across)), xticklabels=[f"{v:g}" for v in across], xlabel=names[0])
        axes.set(yticks=range(len(down)), yticklabels=[f"{v:g}" for v in down], ylabel=names[1])
        axes.set_title(f"{look.glyph} {look.title}", loc="left", color=look.light)

    alt_text = "; ".join(
        f"{names[0]} {x:g}, {names[1]} {y:g}: {percent(one.mean)}{' (selected)' if one.selected else ''}"
        for (x, y), one in sorted(best.items())
    )
    over = f" Each cell is the best over {listing(_KEY_TITLES.get(key, key) for key in others)}." if others else ""
    caption = f"{look.title}: mean dev score in percent; the frame marks the selected config.{over}"
    name = "map-" + re.sub(r"[^a-z0-9]+", "-", f"{look.key}-{keys[0]}-{keys[1]}")
    heading = f"{look.title}: dev score by {names[0]} and {names[1]}"
    return drawing(name, heading, alt_text, caption, PANEL, 0.42 * len(down) + 1.0, draw)


def _fill_map(
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
            axes.plot(
                range(1, len(curve) + 1),
                100 * np.array(curve),
                label=title(arm),
                color=looks[arm].light,
                marker=looks[arm].marker,
                linestyle=looks[arm].dash,
                markersize=4,
            )
        axes.set(xlabel="configs tried", ylabel=f"{metric} on dev, %")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(frameon=False)

    alt_text = " ".join(
        f"{title(arm)}: {percent(curve[0])} with one config, {percent(curve[-1])} with {len(curve)}."
        for arm, curve in curves.items()
    )
    caption = (
        "Expected best dev score of n configs drawn from those that were tried (unbiased, up to half of them; Tang et "
        "al. 2020). It describes this search and tests nothing."
    )
    return drawing("search-expected", "Expected best of n configs", alt_text, caption, PANEL, 2.4, draw)


@dataclass(frozen=True)
class Tried:
    """A config of the tuning stage.

    Attributes:
        values: hyperparameters by name.
        mean: mean dev score over the tuning seeds; a collapsed or diverged run counts 0.
        seeds: number of its tuning seeds.
        ruined: True where one of its runs collapsed or diverged.
        selected: True for the config selected on dev.
    """

    arm: str
    label: str
    values: dict[str, float]
    mean: float
    seeds: int
    ruined: bool
    selected: bool


def tried_configs(study: Study) -> dict[str, list[Tried]]:
    """Return the configs with dev scores of each arm that has several; failed configs have none."""
    rows = study.run_scores
    seeds = _tuning_seeds(study)
    dev = rows[(rows["split"] == "dev") & (rows["scorer"] == study.metric) & (rows["arm"] != BASE)]
    dev = dev[dev["seed"].isin(seeds)] if seeds else dev
    ruined = {
        (trial.arm, trial.config)
        for trial in study.trials
        if trial.state == DIVERGED or {"collapsed", "diverged"} & set(strings(trial.manifest.get("flags")))
    }
    chosen = {arm: mapping(found).get("selected") for arm, found in mapping(study.selection.get("arms")).items()}
    means: dict[tuple[str, str], list[float]] = {}
    for arm, label, mean in dev[["arm", "config", "score"]].itertuples(index=False, name=None):
        means.setdefault((arm, label), []).append(mean)
    found: dict[str, list[Tried]] = {}
    for key, scores in means.items():
        is_ruined, is_selected = key in ruined, chosen.get(key[0]) == key[1]
        one = Tried(*key, _values_in(key[1]), fmean(scores), len(scores), is_ruined, is_selected)
        found.setdefault(key[0], []).append(one)
    return {arm: configs for arm in study.arms if len(configs := found.get(arm, [])) > 1}


def _values_in(label: str) -> dict[str, float]:
    """Return the numeric hyperparameters that a config's label names."""
    values = {}
    for part in label.split(","):
        name, separator, text = part.partition("=")
        if separator:
            with contextlib.suppress(ValueError):
                values[name] = float(text)
    return values


def _tuning_seeds(study: Study) -> list[Json]:
    seeds = study.settings.get("tuning_seeds")
    return list(seeds) if isinstance(seeds, list) else []


def expected_best(scores: Sequence[float]) -> list[float]:
    """Return the expected best of n configs drawn without replacement, for n = 1 to half of them.

    The unbiased estimator `sum_j v_(j) C(j-1, n-1) / C(N, n)` over the sorted scores (Tang et al. 2020, "Showing Your
    Work Doesn't Always Work"); descriptive: its variance is high, and it is no test.
    """
    ordered = sorted(scores)
    total = len(ordered)
    return [
        sum(value * math.comb(j, n - 1) for j, value in enumerate(ordered)) / math.comb(total, n)
        for n in range(1, max(1, total // 2) + 1)
    ]


def sensitivity_table(study: Study) -> Table | None:
    """Show the spread of dev scores over each arm's configs, and the number of ruined ones."""
    tried = tried_configs(study)
    if not tried:
        return None
    rows: dict[str, dict[str, str]] = {}
    base = _base_mean_on_dev(study)
    for arm, configs in tried.items():
        means = np.array([config.mean for config in configs])
        low, middle, high = np.quantile(means, [0.25, 0.5, 0.75])
        cells = {
            "Configs tried": f"{len(configs)}",
            "Best": percent(means.max()),
            "Upper quartile": percent(high),
            "Median": percent(middle),
            "Lower quartile": percent(low),
            "Worst": percent(means.min()),
            "Standard deviation, points": points(means.std(ddof=1), signed=False),
            "Collapsed or diverged": _count_cell(sum(config.ruined for config in configs), len(configs)),
            **_below_base(means, base),
            "Failed trials, not counted above": str(_failed_trials(study, arm)),
            "Selected": next((config.label.replace(",", ", ") for config in configs if config.selected), "none yet"),
        }
        for name, cell in cells.items():
            rows.setdefault(name, {})[arm] = cell
    counts = {len(configs) for configs in tried.values()}
    notes = [
        "" if len(counts) == 1 else "The arms had unequal budgets: their bests and their spreads are not comparable."
    ]
    heads = columns(study, [Config(arm, "", ()) for arm in tried])
    seeds = plural(len(_tuning_seeds(study)), "tuning seed")
    caption = f"Dev scores over the configs that were tried ({seeds})"
    return build(caption, "Over configs", rows, heads, *notes)


def _base_mean_on_dev(study: Study) -> float | None:
    means = study.run_means(Config(BASE, "", ()), study.metric, "dev")
    return float(means.mean()) if len(means) else None


def _below_base(means: np.ndarray, base: float | None) -> dict[str, str]:
    """Count the configs worse than the base: a policy can be ruined without a repetition."""
    if base is None:
        return {}
    return {f"Below the SFT base ({percent(base)})": _count_cell(int((means < base).sum()), len(means))}


def _count_cell(count: int, total: int) -> str:
    return f"{count} of {total} ({percent(count / total, 0)})"


def _failed_trials(study: Study, arm: str) -> int:
    seeds = _tuning_seeds(study)
    return sum(trial.arm == arm and trial.state == FAILED and trial.seed in seeds for trial in study.trials)


def is_fair(study: Study) -> bool:
    """Return True where the arms of the contrast were tuned with the same number of configs."""
    tried = tried_configs(study)
    contrast = [arm for arm in study.arms[:2] if arm in tried]
    return len(contrast) == 2 and len({len(tried[arm]) for arm in contrast}) == 1
