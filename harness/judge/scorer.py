"""The scorer `judge`: every answer against the baseline's answer to the same prompt, in both orders."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness.cache import Cache
from harness.judge.budget import Budget
from harness.judge.compare import Comparison, Judgement, compare_all, judge_facts
from harness.judge.endpoint import Endpoint
from harness.judge.families import judge_warnings
from harness.judge.known import agreement
from harness.judge.template import Template, load_template
from harness.records import write_json
from harness.registration import contrast_of
from harness.scoreconfig import ScoreConfig
from harness.stored import Preference, Run, Stored, as_text, conversation

FACTS = "judge.json"
# What an answer says that is meant for whoever judges it. Flagged, not punished: the judge sees it as it is.
_ADDRESSES_JUDGE = re.compile(
    r"\[\[[AB<>=]+\]\]|ignore (?:all |any )?(?:previous|prior|above) instructions|\b(?:END|BEGIN) [0-9a-f]{12}\b"
    r"|(?:as|dear|to) (?:the |an |a )?(?:impartial )?(?:judge|evaluator|grader)\b|\"verdict\"\s*:",
    re.IGNORECASE,
)


class Judge:
    """A judge that is set up: its template, its endpoint and what it has spent."""

    def __init__(self, config: ScoreConfig, cache: Path) -> None:
        self.template: Template = load_template(config.judge.template)
        self.budget = Budget(config.judge, config.max_cost_usd)
        self.endpoint = Endpoint(config.judge, self.template, Cache(cache / "judge.sqlite"), self.budget)

    def compare(self, comparisons: Sequence[Comparison]) -> list[Judgement]:
        """Judge in both orders."""
        return compare_all(comparisons, self.template, self.endpoint)


def judge_runs(stored: Stored, config: ScoreConfig, cache: Path) -> dict[Path, list[Preference]]:
    """Judge every run that is not scored as worst already; what was judged before costs nothing.

    Writes judge.json into the study's folder: what the judgements say of the judge, and what they cost.
    """
    judge = Judge(config, cache)
    cases = [(run, row, _comparison(stored, run, row)) for run, row in _asked(stored)]
    judgements = judge.compare([comparison for _, _, comparison in cases])
    found: dict[Path, list[Preference]] = {run.folder: [] for run in stored.runs}
    for (run, row, comparison), judgement in zip(cases, judgements, strict=True):
        found[run.folder].append(_preference(row, comparison, judgement))
    facts: dict[str, Any] = {
        "model": config.judge.model,
        "template": config.judge.template,
        "template_sha256": judge.template.sha256,
        **judge_facts([comparison for _, _, comparison in cases], judgements),
        "answers_to_the_judge": _flagged(stored),
        "head_to_head": _head_to_head(stored, judge) if config.head_to_head else None,
        "calibration": agreement(config.calibration_pairs, judge.compare) if config.calibration_pairs else None,
    }
    spent = judge.budget.spent
    facts["cost"] = {
        "requests": spent.requests,
        "cached": spent.cached,
        "input_tokens": spent.input_tokens,
        "output_tokens": spent.output_tokens,
        "usd": spent.cost(config.judge),
    }
    facts["warnings"] = judge_warnings(config, stored, facts)
    write_json(stored.study / FACTS, facts)
    return found


def _asked(stored: Stored) -> list[tuple[Run, dict[str, Any]]]:
    return [(run, row) for run in stored.runs if not run.failed for row in stored.of_run(run)]


def _comparison(stored: Stored, run: Run, row: Mapping[str, Any]) -> Comparison:
    key = (row["split"], row["prompt_id"])
    if row.get("follows"):  # each side is judged with its own first turn
        before = (row["split"], row["follows"])
        asked = as_text([{"role": "user", "content": turn["content"]} for turn in row["prompt"]])
        answer = f"[first turn]\n{run.answers.get(before, '')}\n\n[second turn]\n{run.answers[key]}"
        other = f"[first turn]\n{stored.baseline.get(before, '')}\n\n[second turn]\n{stored.baseline[key]}"
        return Comparison(asked, answer, other)
    return Comparison(as_text(conversation(row, run.answers)), run.answers[key], stored.baseline[key])


def _preference(row: Mapping[str, Any], comparison: Comparison, judgement: Judgement) -> Preference:
    return Preference(
        row["split"],
        row["prompt_id"],
        judgement.score,
        len(comparison.answer),
        len(comparison.baseline),
        "" if judgement.score is not None else judgement.reason,
        {"shown_first": judgement.shown_first, "shown_second": judgement.shown_second, "note": judgement.reason},
    )


def _flagged(stored: Stored) -> dict[str, int]:
    """Count answers that speak to the judge, by run (those that have any)."""
    counts = {
        run.folder.name: sum(_ADDRESSES_JUDGE.search(answer) is not None for answer in run.answers.values())
        for run in stored.runs
    }
    return {name: count for name, count in counts.items() if count}


def _head_to_head(stored: Stored, judge: Judge) -> dict[str, Any]:
    """Compare the two arms' answers with each other on golden, seed by seed.

    Returns:
        `arms`, and by seed the first arm's win rate; secondary, since the arms' seeds are paired here.
    """
    trained = [run for run in stored.runs[1:] if not run.failed]
    arms = contrast_of(list(dict.fromkeys(str(run.manifest["arm"]) for run in trained)))
    if len(arms) < 2:
        return {"arms": arms, "win_rates": {}}
    by_seed = {(str(run.manifest["arm"]), run.manifest["seed"]): run for run in trained}
    rates: dict[str, float] = {}
    for seed in sorted({run.manifest["seed"] for run in trained}):
        first, second = by_seed.get((arms[0], seed)), by_seed.get((arms[1], seed))
        if first is None or second is None:
            continue
        against = replace(stored, baseline=second.answers, runs=(first,))
        rows = [row for row in against.of_run(first) if (row["split"], row["prompt_id"]) in second.answers]
        judgements = judge.compare([_comparison(against, first, row) for row in rows if row["split"] == "golden"])
        scores = [judgement.score for judgement in judgements if judgement.score is not None]
        if scores:
            rates[str(seed)] = sum(scores) / len(scores)
    return {"arms": arms[:2], "win_rates": rates}
