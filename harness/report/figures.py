"""The common figures of a report: a study -> intervals, learning curves and lengths, as SVG text with alt text.

The same study gives the same bytes: fixed salt, no date, no clock, bundled font for the layout.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from harness.config.arms import BASE, title
from harness.decide.words import confidences, interval, listing, percent, plural, points
from harness.report.study import Config, Study
from harness.report.style import INK, LINE, MUTED, PAPER, SCORERS, Drawing, Look, with_alt_text
from harness.study.files import bounds, number
from harness.study.text import one_line, visible

WIDE, PANEL = 4.9, 4.3  # inches; a phone shows a figure at about this size, a desktop a panel beside a panel

_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "harness",
    "text.parse_math": False,  # a `$` in a label is a dollar
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.facecolor": PAPER,
    "figure.facecolor": PAPER,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
}

_LABEL_BOX = {"facecolor": PAPER, "edgecolor": "none", "pad": 1.5}


def draw_interval(study: Study, looks: Mapping[str, Look]) -> Drawing | None:
    """Draw the difference with its intervals, the margin and zero, and below it the run means of each arm."""
    runs = [(config, study.run_means(config, study.metric, study.split)) for config in study.configs]
    runs = [(config, means) for config, means in runs if len(means)]
    middle = number(study.verdict.get("difference")) if len(study.arms) > 1 else None
    if middle is None and not runs:
        return None
    rows = ([1.5] if middle is not None else []) + ([0.45 * len(runs) + 0.35] if runs else [])

    def draw(figure: Figure) -> None:
        axes = figure.subplots(len(rows), 1, squeeze=False, height_ratios=rows)[:, 0]
        if middle is not None:
            _draw_difference(axes[0], study, middle, looks)
        if runs:
            _draw_runs(axes[-1], study, runs, looks)

    alt_text = _difference_alt_text(study) + _runs_alt_text(study, runs)
    wide, narrow = confidences(study.verdict)
    caption = (
        f"Thick bar: {narrow} interval (a tie needs it inside the shaded margin). Thin bar: {wide} interval (a winner "
        "needs it clear of zero). Below: a point is the mean of a run, the tick the mean of the arm's runs; seeds are "
        "not paired between arms."
    )
    return drawing(
        "interval", "Difference between the arms, with intervals", alt_text, caption, WIDE, sum(rows) + 0.75, draw
    )


def _draw_difference(axes: Axes, study: Study, middle: float, looks: Mapping[str, Look]) -> None:
    margin = number(study.verdict.get("margin"))
    ends = {level: bounds(study.verdict.get(level)) for level in ("ci95", "ci90")}
    if margin:
        axes.axvspan(
            -100 * margin, 100 * margin, facecolor=LINE, alpha=0.45, hatch="////", edgecolor=PAPER, linewidth=0
        )
        name = f"margin ±{points(margin, signed=False)}"
        axes.text(0, -0.7, name, ha="center", va="center", color=MUTED, fontsize=8, bbox=_LABEL_BOX, zorder=3)
    axes.axvline(0, color=INK, linewidth=1)
    for level, width in (("ci95", 1.4), ("ci90", 5.0)):
        if interval_ends := ends[level]:
            axes.plot([100 * end for end in interval_ends], [0, 0], color=INK, linewidth=width, solid_capstyle="butt")
    axes.plot([100 * middle], [0], marker="D", markersize=8, color=PAPER, markeredgecolor=INK, markeredgewidth=1.6)
    reach = 100 * max(abs(x) for x in (middle, margin or 0.0, *(e for pair in ends.values() for e in pair or ())))
    reach = max(1.15 * reach, 1.0)
    wide = f" ({confidences(study.verdict)[0]}: {interval(ends['ci95'])})" if ends["ci95"] else ""
    label = f"{points(middle)} points{wide}"
    axes.text(0.5, 1.32, label, transform=axes.transAxes, ha="center", va="bottom", fontweight="bold", fontsize=10)
    axes.set(xlim=(-reach, reach), ylim=(-1.0, 0.7), yticks=[])
    axes.spines["left"].set_visible(False)
    first, second = study.arms[:2]
    axes.set_title(f"◀ {looks[second].glyph} {title(second)} better", loc="left", color=looks[second].light)
    axes.set_title(f"{looks[first].glyph} {title(first)} better ▶", loc="right", color=looks[first].light)
    axes.set_xlabel(f"{title(first)} − {title(second)}, percentage points")


def _draw_runs(axes: Axes, study: Study, runs: Sequence[tuple[Config, pd.Series]], looks: Mapping[str, Look]) -> None:
    for row, (config, means) in enumerate(runs):
        look = looks[config.arm]
        (dots,) = axes.plot(100 * means.to_numpy(), np.full(len(means), row), look.marker)
        dots.set(color=look.light, alpha=0.75, markersize=7)
        axes.plot([100 * means.mean()] * 2, [row - 0.32, row + 0.32], color=look.light, linewidth=2)
    if study.base is not None:
        base = study.run_means(Config(BASE, "", (study.base,)), study.metric, study.split)
        if len(base):
            axes.axvline(100 * base.mean(), color=MUTED, linestyle=":", linewidth=1.4)
            name, box = f"base {percent(base.mean())}", _LABEL_BOX
            axes.text(100 * base.mean(), -0.62, name, ha="center", va="bottom", color=MUTED, fontsize=8, bbox=box)
    names = [f"{looks[c.arm].glyph} {config_name(study, c)}" for c, _ in runs]
    axes.set(yticks=range(len(runs)), yticklabels=names, ylim=(len(runs) - 0.45, -0.72))
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.margins(x=0.12)
    axes.set_xlabel(f"{SCORERS.get(study.metric, one_line(study.metric, 40))} on {study.split}, %")


def _difference_alt_text(study: Study) -> str:
    """Return the difference, its intervals and the margin; empty without a verdict."""
    if number(study.verdict.get("difference")) is None or len(study.arms) < 2:
        return ""
    first, second = study.arms[:2]
    text = f"{title(first)} minus {title(second)}: {points(study.verdict.get('difference'))} points"
    for level, name in zip(("ci95", "ci90"), confidences(study.verdict), strict=True):
        text += f", {name} interval {interval(study.verdict.get(level))}"
    return f"{text}; margin {points(study.verdict.get('margin'), signed=False)}. "


def _runs_alt_text(study: Study, runs: Sequence[tuple[Config, pd.Series]]) -> str:
    """Return each config's mean and the means of its runs."""
    return " ".join(
        f"{config_name(study, config)}: mean {percent(means.mean())}, runs {listing(map(percent, means))}."
        for config, means in runs
    )


def draw_learning(study: Study, looks: Mapping[str, Look]) -> list[Drawing]:
    """Draw each arm's learning curves in a figure of its own: the quantities differ between arms."""
    drawings = []
    for arm in study.arms:
        trials = [
            trial for config in study.configs if config.arm == arm for trial in config.trials if _has_steps(trial.curve)
        ]
        panels = [
            (key, label)
            for key, label in _curve_labels(arm)
            if any(key in t.curve and t.curve[key].notna().any() for t in trials)
        ]
        if panels:
            drawings.append(_draw_arm(arm, [trial.curve for trial in trials], panels, looks[arm]))
    return drawings


def _curve_labels(arm: str) -> tuple[tuple[str, str], ...]:
    return (
        ("loss", f"{title(arm)} loss"),
        ("grad_norm", "Gradient norm"),
        ("rewards/accuracies", "rewards/accuracies (trainer)"),
    )


def _has_steps(curve: pd.DataFrame) -> bool:
    return "step" in curve and len(curve) > 0


def _draw_arm(arm: str, curves: Sequence[pd.DataFrame], panels: Sequence[tuple[str, str]], look: Look) -> Drawing:
    name = "learning-" + re.sub(r"[^a-z0-9]+", "-", look.key)

    def draw(figure: Figure) -> None:
        axes = figure.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0]
        for ax, (key, label) in zip(axes, panels, strict=True):
            for curve in curves:
                if key in curve:
                    ax.plot(
                        curve["step"],
                        curve[key].where(np.isfinite(curve[key])),
                        color=look.light,
                        alpha=0.35,
                        linewidth=1,
                    )
            mean = _mean_curve(curves, key)
            ax.plot(
                mean.index,
                mean,
                color=look.light,
                linewidth=2,
                linestyle=look.dash,
                marker=look.marker,
                markersize=3.5,
                markevery=max(1, len(mean) // 12),
            )
            ax.set_title(label, loc="left")
        axes[0].set_title(f"{look.glyph} {title(arm)}", loc="right", color=look.light, fontweight="bold")
        axes[-1].set_xlabel("step")
        axes[-1].xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))

    alt_text = _learning_alt_text(arm, {label: _mean_curve(curves, key) for key, label in panels}, len(curves))
    several = "thin lines are runs, the thick line is their mean"
    caption = f"{title(arm)}: {several if len(curves) > 1 else 'one run'}."
    return drawing(name, f"Learning curves of {title(arm)}", alt_text, caption, PANEL, 1.35 * len(panels) + 0.6, draw)


def _mean_curve(curves: Sequence[pd.DataFrame], key: str) -> pd.Series:
    rows = pd.concat([curve[["step", key]] for curve in curves if key in curve])
    return rows.replace([np.inf, -np.inf], np.nan).groupby("step")[key].mean()


def _learning_alt_text(arm: str, curves: Mapping[str, pd.Series], num_runs: int) -> str:
    """Return the first and last value of each curve, the mean over runs by step."""
    text = f"{title(arm)}, {plural(num_runs, 'run')}."
    for label, curve in curves.items():
        mean = curve.dropna()
        ends = f"{mean.iloc[0]:.3g} at step {mean.index[0]:g}, {mean.iloc[-1]:.3g} at step {mean.index[-1]:g}"
        text += f" {label}: {ends}."
    return text


def draw_lengths(study: Study, looks: Mapping[str, Look]) -> Drawing | None:
    """Draw the distribution of the completions' lengths in tokens: a row for the base and for each config."""
    lengths = []
    for config in study.with_base:
        rows = [row for trial in config.trials for row in study.completions(trial)]
        tokens = [row["tokens"] for row in rows if row["tokens"] is not None]
        if tokens:
            lengths.append((config, np.asarray(tokens, dtype=float)))
    if not lengths:
        return None
    top = max(1.0, *(tokens.max() for _, tokens in lengths))
    width = max(1, int(np.ceil(top / 40)))
    bins = np.arange(0, top + 2 * width, width) - 0.5

    def draw(figure: Figure) -> None:
        axes = figure.subplots(len(lengths), 1, squeeze=False, sharex=True, sharey=True)[:, 0]
        for ax, (config, tokens) in zip(axes, lengths, strict=True):
            look = looks[config.arm]
            ax.hist(
                tokens,
                bins=bins,
                weights=np.full(len(tokens), 100 / len(tokens)),
                color=look.light,
                alpha=0.55,
                linewidth=0,
            )
            ax.axvline(tokens.mean(), color=INK, linewidth=1.2, linestyle="--")
            ax.set_title(f"{look.glyph} {config_name(study, config)}", loc="left", color=look.light)
            ax.set_title(f"mean {tokens.mean():.1f}", loc="right", fontsize=8)
            ax.set_ylabel("%")
        axes[-1].set_xlabel(f"tokens of a completion on {study.split}")

    alt_text = _lengths_alt_text(study, lengths)
    caption = "Share of completions by length, all seeds together, on one axis for all; the dashed line is the mean."
    return drawing("lengths", "Length of the completions", alt_text, caption, WIDE, 0.95 * len(lengths) + 0.6, draw)


def _lengths_alt_text(study: Study, lengths: Sequence[tuple[Config, np.ndarray]]) -> str:
    """Return mean, median and range of each config's lengths, in tokens."""
    return " ".join(
        f"{config_name(study, config)}: mean {tokens.mean():.1f}, median {np.median(tokens):.0f}, "
        f"from {tokens.min():.0f} to {tokens.max():.0f} tokens."
        for config, tokens in lengths
    )


def drawing(
    name: str, heading: str, alt_text: str, caption: str, width: float, height: float, draw: Callable[[Figure], None]
) -> Drawing:
    """Draw a figure in the report's style; the same inputs give the same bytes.

    Args:
        name: file name without `.svg`.
        heading: title of the figure.
        alt_text: its content with the numbers.
        caption: how to read it.
        width, height: inches.
        draw: draws on the empty figure.
    """
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        canvas = FigureCanvasSVG(figure)
        draw(figure)
        buffer = io.StringIO()
        canvas.print_svg(buffer, metadata={"Date": None})  # savefig would draw everything twice
    text = with_alt_text(buffer.getvalue(), name=name, title=visible(heading), alt_text=visible(alt_text))
    return Drawing(name, heading, alt_text, caption, text, wide=width == WIDE)


def config_name(study: Study, config: Config) -> str:
    """Return a config's name in prose, on one line: the arm, and its label where the arm has other configs."""
    suffix = visible(study.label(config).removeprefix(config.arm))
    return title(config.arm) + (f"{suffix[:40]}…" if len(suffix) > 40 else suffix)
