"""The scorer `judge`: every answer against the baseline's answer to the same prompt, in both orders."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from scipy import stats

from harness.config.schema import DataConfig, ScoreConfig
from harness.data.records import Pair
from harness.data.table import read_table
from harness.score.answers import Preference, Run, Stored, as_text, conversation
from harness.score.judge_endpoint import Budget, Cache, Endpoint
from harness.score.judge_protocol import Comparison, Judgement, Template, compare_all, judge_facts, load_template
from harness.study.files import write_json
from harness.study.registration import contrast_of, read_study

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
        self.endpoint = Endpoint(config.judge, self.template.schema, Cache(cache / "judge.sqlite"), self.budget)

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


# Families of models, by what their names contain.
_FAMILIES = {
    "OpenAI": r"gpt|\bo[1-9]\b|\bo[1-9]-|davinci|chatgpt",
    "Anthropic": r"claude",
    "Google": r"gemini|gemma|palm",
    "Meta": r"llama",
    "Mistral": r"mi[sx]tral|ministral|magistral|codestral",
    "Qwen": r"qwen|qwq",
    "DeepSeek": r"deepseek",
    "Microsoft": r"\bphi\b|phi-?[1-9]",
    "Hugging Face": r"smollm|zephyr",
    "AI2": r"olmo|tulu",
    "Cohere": r"command-r|cohere|aya",
    "RLHFlow": r"armorm",
}
# Who labelled published preference sets, as far as their cards say so.
_LABELLERS = {
    "ultrafeedback-armorm": "ArmoRM",
    "ultrafeedback": "gpt-4",
    "distilabel": "gpt-4",
    "alpaca_farm": "gpt-4",
    "nectar": "gpt-4",
}
FLIPS = 0.4
SLOT = 0.2
LONGER = 0.75


def family(name: str | None) -> str | None:
    """Return the family that a model's name tells, or None."""
    found = (name or "").lower()
    return next((title for title, pattern in _FAMILIES.items() if re.search(pattern, found)), None)


def labeller_of(config: ScoreConfig, study: Mapping[str, Any]) -> str | None:
    """Return who labelled the training pairs: what the config says, or what is known of a published set."""
    if config.labeller:
        return config.labeller
    path = str((study.get("data", {}).get("train") or {}).get("path", "")).lower()
    return next((labeller for name, labeller in _LABELLERS.items() if name in path), None)


def kinship_warnings(name: str | None, kind: str, config: ScoreConfig, study: Mapping[str, Any]) -> Iterator[str]:
    """Yield a warning where who scores is of the policy's family, or is (of the family of) who labelled the pairs."""
    own = family(name)
    policy = str((study.get("model") or {}).get("path", ""))
    if own and own == family(policy):
        yield f"the {kind} {name} and the policy {policy} are of one family ({own}): models favour their own kind"
    labeller = labeller_of(config, study)
    if labeller and name and (labeller.lower() in name.lower() or (own and own == family(labeller))):
        yield (
            f"the {kind} {name} is, or is related to, {labeller}, which labelled the training pairs: what was trained "
            "to please it is judged by it"
        )


def judge_warnings(config: ScoreConfig, stored: Stored, facts: Mapping[str, Any]) -> list[str]:
    """Return what a reader of the verdict must know of the judge."""
    study = read_study(stored.study / "study.yaml")
    found = list(kinship_warnings(config.judge.model, "judge", config, study))
    flips, slot, longer = facts["flip_rate"], facts["first_slot_rate"], facts["longer_wins_rate"]
    if flips is not None and flips > FLIPS:
        found.append(f"the judge contradicts itself on {flips:.0%} of the comparisons when the order changes")
    if slot is not None and abs(slot - 0.5) > SLOT:
        found.append(f"the judge prefers the answer shown first in {slot:.0%} of its verdicts (fair: 50%)")
    if longer is not None and not 1 - LONGER <= longer <= LONGER:
        found.append(f"the longer answer wins {longer:.0%} of the decided comparisons; see length_controlled")
    if facts["answers_to_the_judge"]:
        counts = ", ".join(f"{name} {count}" for name, count in facts["answers_to_the_judge"].items())
        found.append(f"answers that speak to the judge, by run: {counts}; read them before you trust its verdicts")
    known = facts.get("calibration")
    if known and known["ci95"] and known["ci95"][0] <= 0.5:
        found.append(
            f"on {known['pairs']} pairs with known labels the judge agrees in {known['agreement']:.0%} "
            f"({known['ci95'][0]:.0%} to {known['ci95'][1]:.0%}): not shown to be better than a coin"
        )
    return found


def agreement(reference: str, compare: Callable[[Sequence[Comparison]], list[Judgement]]) -> dict[str, Any]:
    """Ask the judge about pairs with known labels.

    Args:
        reference: a file of preference pairs, in any form that `data.golden` reads.
        compare: asks the judge, in both orders.

    Returns:
        `path`, `pairs`, `unscored`, `agreement` (a contradiction counts half) and its Wilson interval at 95%, which
        is too wide rather than too narrow where there are contradictions.
    """
    limit = DataConfig().max_bad_fraction
    table = read_table(reference, key="score.calibration_pairs", revision=None, max_bad_fraction=limit)
    pairs = [pair for row in table.rows if (pair := row.pair()) is not None]
    judgements = compare([_known_comparison(pair) for pair in pairs])
    scores = [judgement.score for judgement in judgements if judgement.score is not None]
    found = {"path": reference, "pairs": len(pairs), "unscored": len(pairs) - len(scores)}
    if not scores:
        return {**found, "agreement": None, "ci95": None}
    share = fmean(scores)
    return {**found, "agreement": share, "ci95": list(wilson(share, len(scores)))}


def _known_comparison(pair: Pair) -> Comparison:
    return Comparison(as_text(pair.prompt), as_text(pair.chosen), as_text(pair.rejected))


def wilson(share: float, count: int, level: float = 0.95) -> tuple[float, float]:
    """Return Wilson's score interval of a share of `count` cases (Wilson 1927)."""
    z = float(stats.norm.ppf((1 + level) / 2))
    centre = share + z * z / (2 * count)
    spread = z * (share * (1 - share) / count + z * z / (4 * count * count)) ** 0.5
    scale = 1 + z * z / count
    return (centre - spread) / scale, (centre + spread) / scale
