"""The tables of scores, completions, guards, trials and the judge: a study -> frames of text, as HTML or Markdown.

Cells are plain text and may be hostile; they are escaped when a table is rendered, and nowhere before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from markupsafe import Markup

from harness.config.arms import BASE, title
from harness.data.unicode import count_words
from harness.decide.stats import contrast
from harness.decide.words import (
    MISSING,
    alpha_of,
    confidence,
    confidences,
    interval,
    listing,
    pair_word,
    percent,
    plural,
    points,
)
from harness.report.study import COMPLETE, Config, Study
from harness.report.style import DEFINITIONS, PREFERENCE, SCORERS, Look
from harness.study.collapse import degenerate_shares
from harness.study.files import Json, Reader, mapping, number, strings
from harness.study.text import html, markdown, one_line

_CELL_LIMIT = 400


@dataclass(frozen=True)
class Table:
    """A table for people.

    Attributes:
        caption: title of the table.
        frame: text cells; the index holds the row headers under the index name, columns have headers of their own.
        arms: {column header: arm}, for columns that show an arm with its colour and marker.
        notes: sentences below the table.
        code: True where cells are identifiers such as hashes.
    """

    caption: str
    frame: pd.DataFrame
    arms: Mapping[str, str]
    notes: tuple[str, ...] = ()
    code: bool = False

    def html(self, looks: Mapping[str, Look]) -> Markup:
        """Render with pandas; row and column headers have a scope."""
        frame = self.frame.map(lambda cell: str(html(cell, _CELL_LIMIT)))
        heads = [str(self._html_head(str(name), looks)) for name in frame.columns]
        names = [str(html(name, _CELL_LIMIT)) for name in frame.index]
        corner = str(html(frame.index.name or ""))
        frame = frame.set_axis(names, axis=0).set_axis(heads, axis=1).rename_axis(columns=corner)
        with pd.option_context("display.max_colwidth", None):  # pandas cuts cells at 50 characters otherwise
            text = frame.to_html(escape=False, border=0, classes="code" if self.code else None)
        # Cells are escaped, so that each `<th>` is pandas' own.
        head, _, body = text.replace(' style="text-align: right;"', "").partition("</thead>")
        table = head.replace("<th>", '<th scope="col">') + "</thead>" + body.replace("<th>", '<th scope="row">')
        opening, _, rest = table.partition("\n")
        return Markup("{}<caption><span>{}</span></caption>{}").format(
            Markup(opening), html(self.caption), Markup(rest)
        )

    def markdown(self, looks: Mapping[str, Look]) -> Markup:
        """Render as a GitHub table."""

        def text(cell: Json) -> str:
            return str(markdown(cell, _CELL_LIMIT))

        heads = [str(column) for column in self.frame.columns]
        columns = [
            f"{looks[self.arms[h]].glyph} {text(_column_title(h, self.arms))}" if h in self.arms else text(h)
            for h in heads
        ]
        rows = [[text(str(self.frame.index.name or "")) or " ", *columns], ["---"] * (1 + len(columns))]
        rows += [
            [text(name), *map(text, row)] for name, row in zip(self.frame.index, self.frame.to_numpy(), strict=True)
        ]
        return Markup("\n".join(f"| {' | '.join(row)} |" for row in rows))

    def _html_head(self, column: str, looks: Mapping[str, Look]) -> Markup:
        if column not in self.arms:
            return html(column)
        look = looks[self.arms[column]]
        chip = '<span class="arm arm-{}"><span aria-hidden="true">{}</span> {}</span>'
        return Markup(chip).format(look.key, look.glyph, html(_column_title(column, self.arms)))


def _column_title(column: str, arms: Mapping[str, str]) -> str:
    """Return a column's title: the arm's name in prose, with the config where the header has one."""
    arm = arms[column]
    return title(arm) + column.removeprefix(arm)


def build(
    caption: str, corner: str, rows: Mapping[str, Mapping[str, str]], arms: Mapping[str, str], *notes: str
) -> Table:
    """Build a table from `{row header: {column header: cell}}`; a cell that a row lacks is shown as missing."""
    frame = pd.DataFrame.from_dict(dict(rows), orient="index", dtype="object").fillna(MISSING)
    frame.index.name = corner
    shown = {name: arm for name, arm in arms.items() if name in frame}
    return Table(caption, frame, shown, tuple(note for note in notes if note))


def columns(study: Study, configs: Sequence[Config]) -> dict[str, str]:
    """Return `{column header: arm}` of configs."""
    return {study.label(config): config.arm for config in configs}


def preference_table(study: Study) -> Table | None:
    """Show held-out preference accuracy by both definitions, before training (the base) and after."""
    rows = {}
    for split in ("golden", "dev"):
        for scorer, definition in DEFINITIONS.items():
            cells = mean_cells(study, scorer, split)
            if cells and (set(cells) != {BASE} or not study.configs):  # seeds that decide may not have answered dev
                rows[f"{definition}, {split} pairs"] = cells
    if not rows:
        return None
    return build(
        "Preference accuracy on held-out pairs: how often the chosen answer is ranked first",
        "Ranked by",
        rows,
        columns(study, study.with_base),
        "DPO's reward is the summed log-ratio to the SFT base, SimPO's reward the mean log-prob of an answer.",
        "The SFT base is the state before training. By DPO's reward it prefers nothing (50%): it is its own reference.",
        "Each arm is trained on one of the two definitions; compare the arms on both.",
    )


def degenerate_table(study: Study) -> Table | None:
    """Count degenerate completions on the shown split, over all seeds."""
    rows: dict[str, dict[str, str]] = {}
    for config in study.with_base:
        runs = [run for trial in config.trials if (run := study.completions(trial))]
        answers = [answer for run in runs for answer in run]
        if not answers:
            continue
        label = study.label(config)
        rows.setdefault("Completions", {})[label] = f"{len(answers):,}"
        for flag, text in (("empty", "Empty"), ("cut_off", "Cut off at the token limit"), ("repetition", "Repetition")):
            count = sum(flag in answer["flags"] for answer in answers)
            rows.setdefault(text, {})[label] = f"{count:,} ({percent(count / len(answers))})"
        same = max(degenerate_shares(run)["same_answer"] for run in runs)
        rows.setdefault("Most frequent answer of a run", {})[label] = percent(same)
    if not rows:
        return None
    note = "“Most frequent answer” is the share of prompts that got the same answer, in the run where it is highest."
    return build(f"Degenerate output on the {study.split} set", "Kind", rows, columns(study, study.with_base), note)


def length_table(study: Study) -> Table | None:
    """Show the length of the completions in tokens, words and characters, and apart from it that of the thinking."""
    rows: dict[str, dict[str, str]] = {}
    thinks = any(
        a["thinking_tokens"] for config in study.with_base for t in config.trials for a in study.completions(t)
    )
    for config in study.with_base:
        answers = [answer for trial in config.trials for answer in study.completions(trial)]
        if not answers:
            continue
        tokens = pd.Series([a["tokens"] for a in answers if a["tokens"] is not None], dtype=float)
        thinking = pd.Series([a["thinking_tokens"] or 0 for a in answers])
        for name, value in (
            ("Tokens, mean", tokens.mean()),
            ("Tokens, median", tokens.median()),
            ("Tokens, 95th percentile", tokens.quantile(0.95)),
            ("Words, mean", pd.Series([count_words(a["completion"]) for a in answers]).mean()),
            ("Characters, mean", pd.Series([len(a["completion"]) for a in answers]).mean()),
        ):
            rows.setdefault(name, {})[study.label(config)] = MISSING if number(value) is None else f"{value:.1f}"
        if thinks:
            label, shown = study.label(config), f"{int((thinking > 0).sum()):,} ({percent((thinking > 0).mean())})"
            rows.setdefault("Thinking tokens, mean", {})[label] = f"{thinking.mean():.1f}"
            rows.setdefault("Completions with thinking", {})[label] = shown
    if not rows:
        return None
    note = "Thinking is cut off before answers are scored, judged and measured; it counts in the last two rows alone."
    caption = f"Length of the completions on the {study.split} set"
    return build(caption, "Length", rows, columns(study, study.with_base), note if thinks else "")


def guard_table(guards: Sequence[Mapping[str, Json]]) -> Table | None:
    """Show the guards, and whether the winner (or the first arm, where there is none) passes them."""
    rows = {}
    for guard in guards:
        passed, margin = guard.get("passed"), number(guard.get("margin"))
        rows[one_line(guard.get("metric", "unnamed"))] = {
            "Result": "held" if passed is True else "FAILED" if passed is False else "not judged",
            "Arm": title(str(guard.get("of") or MISSING)),
            "Difference (points)": points(guard.get("difference")),
            "At worst (points)": points(guard.get("lower_bound")),
            "Allowed (points)": MISSING if margin is None else points(-margin),
        }
    if not rows:
        return None
    note = (
        "“At worst” is the one-sided lower bound of the difference; the guard holds where it is above what is allowed."
    )
    return build(
        "Guards: here the arm must not be worse than the other by more than is allowed", "Metric", rows, {}, note
    )


def ranking_table(verdict: Mapping[str, Json]) -> Table | None:
    """Show every pair of arms and the arms that none beats; None with two arms."""
    pairs = verdict.get("pairs")
    rows = {}
    for pair in map(mapping, pairs if isinstance(pairs, list) else []):
        alpha = number(pair.get("alpha"))
        rows[" − ".join(map(title, strings(pair.get("arms"))))] = {
            "Result": pair_word(str(pair.get("verdict") or MISSING)),
            "Difference (points)": points(pair.get("difference")),
            "Interval (points)": interval(pair.get("ci95")),
            "Confidence": MISSING if alpha is None else confidence(alpha),
        }
    if len(rows) < 2:
        return None
    best = listing(map(title, strings(verdict.get("best_set"))))
    note = f"Arms that no arm beats: {best}. The first pair is the registered contrast; the others share alpha (Holm)."
    return build("Ranking: all pairs of arms", "Pair", rows, {}, note)


def trial_table(study: Study) -> Table | None:
    """Show one row per trial, in whatever state."""
    rows = {}
    arms, metric = list(study.arms), study.metric
    runs = study.run_scores[(study.run_scores["split"] == study.split) & (study.run_scores["scorer"] == metric)]
    means = runs.set_index(["arm", "config", "seed"])["score"].to_dict()
    for trial in sorted(
        study.trials, key=lambda t: (arms.index(t.arm) if t.arm in arms else 99, t.config, t.seed or 0)
    ):
        seconds = [number(value) or 0.0 for value in mapping(trial.manifest.get("seconds")).values()]
        flags = trial.manifest.get("flags")
        others = [str(flag) for flag in flags if flag != trial.state] if isinstance(flags, list) else []
        rows[trial.trial_id] = {
            "Arm": title(trial.arm) or MISSING,
            "Config": trial.config.replace(",", ", ") or MISSING,
            "Seed": MISSING if trial.seed is None else str(trial.seed),
            "State": ", ".join([trial.state, *others]),
            f"{metric or 'score'} on {study.split}": percent(means.get((trial.arm, trial.config, trial.seed))),
            "Seconds": f"{sum(seconds):.0f}" if seconds else MISSING,
        }
    done = sum(trial.state == COMPLETE for trial in study.trials)
    return build(f"All trials: {done} of {len(study.trials)} complete", "Trial", rows, {}) if rows else None


def mean_cells(study: Study, scorer: str, split: str) -> dict[str, str]:
    """Return `{column header: mean, with the standard deviation over seeds}`."""
    cells = {}
    for config in study.with_base:
        means = study.run_means(config, scorer, split)
        if len(means):
            spread = f" ±\u00a0{points(means.std(ddof=1), signed=False)}" if len(means) > 1 else ""
            cells[study.label(config)] = percent(means.mean()) + spread
    return cells


def score_table(study: Study) -> Table | None:
    """Show every scorer's mean on the shown split, with its interval; the deciding one first."""
    names = [n for n in study.confirmed["scorer"].unique() if not n.startswith(PREFERENCE) or n == study.metric]
    names.sort(key=lambda name: name != study.metric)
    rows = {}
    for scorer in names:
        decides = " (decides)" if scorer == study.metric else ""
        rows[SCORERS.get(scorer, scorer) + decides] = _interval_cells(study, scorer)
    if not rows:
        return None
    runs = {study.label(config): study.run_means(config, study.metric, study.split) for config in study.with_base}
    rows["Standard deviation over seeds, points"] = {
        label: points(means.std(ddof=1), signed=False) if len(means) > 1 else MISSING for label, means in runs.items()
    }
    rows["Seeds"] = {label: str(len(means)) for label, means in runs.items()}
    rows |= _unscored_rows(study)
    return build(
        f"Scores on the {study.split} set: mean over prompts and seeds, higher is better",
        "Scorer",
        rows,
        columns(study, study.with_base),
        f"In brackets the {confidences(study.verdict)[0]} interval of that arm's mean, over seeds and prompts as in "
        "the decision (with one seed over prompts alone). The arms answer the same prompts: that two intervals overlap "
        "does not make them alike; look at the interval of the difference.",
        ""
        if study.base
        else "No SFT base is stored in this study, so there is nothing to compare with before training.",
    )


def _interval_cells(study: Study, scorer: str) -> dict[str, str]:
    """Return `{column header: mean and interval}`."""
    cells = {}
    for config in study.with_base:
        means = study.run_means(config, scorer, study.split)
        if len(means):
            ends = mean_interval(study, config, scorer)
            shown = f" ({100 * ends[0]:.1f} to {100 * ends[1]:.1f})" if ends else ""
            cells[study.label(config)] = percent(means.mean()) + shown
    return cells


def mean_interval(study: Study, config: Config, scorer: str) -> tuple[float, float] | None:
    """Return the interval of a config's mean at the study's confidence; prompts unscored in a run are left out.

    The variance is the rule's own (`harness.decide.stats.contrast`) with one arm: its seeds, and the prompts.

    Returns:
        None with fewer than two prompts or clusters scored in all runs, or where the runs differ in their prompts.
    """
    scores = study.arm_scores(config, scorer)
    if scores is None:
        return None
    scored = ~np.isnan(scores.values).any(axis=0)
    try:
        found = contrast([scores.values[:, scored]], [1.0], scores.clusters[scored])
    except ValueError:
        return None
    low, high = found.interval(1 - alpha_of(study.verdict))
    return float(np.clip(low, 0, 1)), float(np.clip(high, 0, 1))


def _unscored_rows(study: Study) -> dict[str, dict[str, str]]:
    """Count prompts without a score, by reason, where there are any."""
    rows = study.confirmed
    empty = rows[rows["score"].isna() & (rows["scorer"] == study.metric)]
    cells = {}
    for config in study.with_base if len(empty) else ():
        mine = empty[(empty["arm"] == config.arm) & ((empty["config"] == config.label) | (config.arm == BASE))]
        reasons = mine["unscored_reason"].value_counts().items()
        text = "; ".join(f"{plural(count, 'prompt')}: {reason or 'no reason given'}" for reason, count in reasons)
        cells[study.label(config)] = text or "0"
    return {"Unscored (not counted as 0)": cells} if cells else {}


def judge_table(study: Study) -> Table | None:
    """Show the facts of judge.json; None without them."""
    facts = Reader(study.folder).mapping(study.folder / "judge.json")
    if not facts:
        return None
    rows = {
        "Judge": f"{facts.get('model')}, template {facts.get('template')}",
        "Comparisons": f"{_count_cell(facts, 'comparisons')}, each in both orders; "
        f"{_count_cell(facts, 'unscored')} unscored, "
        f"{_count_cell(facts, 'unreadable_replies')} replies that were no verdict",
        "Contradicts itself when the order changes": percent(facts.get("flip_rate")),
        "Ties": percent(facts.get("tie_rate")),
        "Verdicts for the answer shown first (fair: 50%)": percent(facts.get("first_slot_rate")),
        "Decided comparisons that the longer answer wins": percent(facts.get("longer_wins_rate")),
        "Agreement with known labels": _agreement_cell(mapping(facts.get("calibration"))),
        "Cost of the last call": _judge_cost_cell(mapping(facts.get("cost"))),
    }
    shown = {name: {"Found": text} for name, text in rows.items() if text != MISSING}
    note = "A contradiction counts as a tie. What was judged before is not asked for again, and costs nothing."
    return build("The judge", "What", shown, {}, note)


def _count_cell(facts: Mapping[str, Json], key: str) -> str:
    value = number(facts.get(key))
    return MISSING if value is None else f"{value:,.0f}"


def _agreement_cell(known: Mapping[str, Json]) -> str:
    share, ends = number(known.get("agreement")), known.get("ci95")
    if share is None or not isinstance(ends, list):
        return MISSING
    return f"{percent(share)} of {known.get('pairs')} pairs, 95% {percent(ends[0])} to {percent(ends[1])}"


def _judge_cost_cell(cost: Mapping[str, Json]) -> str:
    dollars = number(cost.get("usd"))
    price = "" if dollars is None else f", ${dollars:.2f}"
    if not cost:
        return MISSING
    return (
        f"{_count_cell(cost, 'requests')} requests ({_count_cell(cost, 'cached')} known before), "
        f"{_count_cell(cost, 'input_tokens')} tokens in and {_count_cell(cost, 'output_tokens')} out{price}"
    )
