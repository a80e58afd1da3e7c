"""The scorer `judge`: each answer against the baseline's answer to the same prompt, in both orders.

Input: stored answers -> preferences per run, and judge.json in the study's folder: facts, cost and warnings.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple, TypedDict

from scipy import stats

from harness.config.checkpoint import Checkpoints
from harness.config.schema import DataConfig, JudgeConfig, ScoreConfig
from harness.config.trial_id import plain
from harness.data.conversations import says
from harness.data.reasoning import part
from harness.data.records import Message, Pair
from harness.data.table import read_table
from harness.score.answers import Preference, Run, Stored, as_text, conversation
from harness.score.judge_endpoint import Budget, Cache, Endpoint, StoredReply, endpoint_problems, estimate
from harness.score.judge_protocol import Comparison, Judgement, ReplyFacts, compare_all, judge_facts, load_template
from harness.study.errors import UsageError
from harness.study.files import Json, write_json
from harness.study.registration import read_study
from harness.study.rows import PromptRow

FACTS = "judge.json"
_REGISTERED = ("model", "base_url", "structured", "max_tokens", "temperature")
# Text in an answer that addresses a judge. It is counted and not punished: the judge reads the answer unchanged.
_ADDRESSES_JUDGE = re.compile(
    r"\[\[[AB<>=]+\]\]|ignore (?:all |any )?(?:previous|prior|above) instructions|\b(?:END|BEGIN) [0-9a-f]{12}\b"
    r"|(?:as|dear|to) (?:the |an |a )?(?:impartial )?(?:judge|evaluator|grader)\b|\"verdict\"\s*:",
    re.IGNORECASE,
)
# Families of models, by patterns of their names.
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
# Labellers of published preference sets, by a part of the set's name, as their data cards say.
_LABELLERS = {
    "ultrafeedback-armorm": "ArmoRM",
    "ultrafeedback": "gpt-4",
    "distilabel": "gpt-4",
    "alpaca_farm": "gpt-4",
    "nectar": "gpt-4",
}
# Limits of the warnings: shares in [0, 1].
_MAX_FLIPS = 0.4
_MAX_SLOT_BIAS = 0.2
_MAX_LONGER_WINS = 0.75


class Agreement(TypedDict):
    """Agreement of the judge with pairs of known labels, and its Wilson interval at 95%; None without scores."""

    path: str
    pairs: int
    unscored: int
    agreement: float | None
    ci95: list[float] | None


class Cost(TypedDict):
    """Requests, tokens and US dollars of one call; `usd` is None without prices."""

    requests: int
    cached: int
    input_tokens: int
    output_tokens: int
    usd: float | None


class JudgeFacts(ReplyFacts):
    """judge.json; `answers_to_the_judge` is the number of answers that address a judge, by run."""

    model: str | None
    template: str
    template_sha256: str
    answers_to_the_judge: dict[str, int]
    calibration: Agreement | None
    cost: Cost
    warnings: list[str]


class PlannedAnswer(NamedTuple):
    """A prompt to be judged, and the number of runs that will answer it."""

    prompt: Sequence[Message]
    times: int


def judge_problems(score: ScoreConfig) -> Iterator[str]:
    """Yield what the judge lacks: an endpoint, a template, or prices for the cost limit."""
    judge = score.judge
    yield from endpoint_problems(judge)
    if score.max_cost_usd is not None and judge.input_price is None and judge.output_price is None:
        yield "score.max_cost_usd: cannot be kept without score.judge.input_price and score.judge.output_price"
    try:
        load_template(judge.template)
    except UsageError as error:
        yield str(error)


def judge_settings(score: ScoreConfig, checkpoints: Checkpoints) -> dict[str, Json]:
    """Return the registered settings of the judge."""
    settings = {key: value for key, value in plain(score.judge).items() if key in _REGISTERED}
    return {"judge": {**settings, "template_sha256": load_template(score.judge.template).sha256}}


def other_judge_problem(registered: Mapping[str, Any], score: ScoreConfig) -> str | None:
    """Refuse another judge than the registered one, which decides; None where it is the same.

    Args:
        registered: `judge_settings` in the registration; empty where no judge decides.
        score: the settings to score with.
    """
    judge = registered.get("judge")
    if not judge or (judge["model"], judge["base_url"]) == (score.judge.model, score.judge.base_url):
        return None
    return (
        f"score.judge.model={score.judge.model}: this study is decided by the judge {judge['model']} at "
        f"{judge['base_url'] or 'the default endpoint'}, registered before the first trial; judge it by another "
        "one in a study of its own, study=NAME (finished trials of the same config train again there)"
    )


def planned_judging(score: ScoreConfig, answers: Sequence[PlannedAnswer], max_new_tokens: int) -> str:
    """Format an upper bound on requests, tokens and cost, with every answer `max_new_tokens` tokens long."""
    template = load_template(score.judge.template)
    longest = "word " * max_new_tokens
    requests = [
        template.messages(answer.prompt[-1]["content"], longest, longest)
        for answer in answers
        for _ in range(2 * answer.times)
    ]
    most = estimate(score.judge, requests)
    return f"judge {score.judge.model}: at most {most}, were every answer as long as it may be"


class Judge:
    """A judge with its template, endpoint, cache and budget."""

    def __init__(self, config: JudgeConfig, max_cost_usd: float | None, cache: Path) -> None:
        self.config = config
        self.template = load_template(config.template)
        self.budget = Budget(config, max_cost_usd)
        replies: Cache[StoredReply] = Cache(cache / "judge.sqlite")
        self.endpoint = Endpoint(config, self.template.schema, replies, self.budget)

    def compare(self, comparisons: Sequence[Comparison]) -> list[Judgement]:
        """Judge each comparison in both orders."""
        return compare_all(comparisons, self.template, self.endpoint)

    def cost(self) -> Cost:
        """Return requests, tokens and US dollars so far."""
        spent = self.budget.spent
        return {
            "requests": spent.requests,
            "cached": spent.cached,
            "input_tokens": spent.input_tokens,
            "output_tokens": spent.output_tokens,
            "usd": spent.cost(self.config),
        }


def judge_runs(stored: Stored, config: ScoreConfig, cache: Path) -> dict[Path, list[Preference]]:
    """Judge every run that does not score as worst already; writes judge.json into the study's folder.

    Cached replies cost nothing.
    """
    judge = Judge(config.judge, config.max_cost_usd, cache)
    cases = stored.cases()
    comparisons = [_comparison(stored, run, row) for run, row in cases]
    judgements = judge.compare(comparisons)
    found: dict[Path, list[Preference]] = {run.folder: [] for run in stored.runs}
    for (run, row), comparison, judgement in zip(cases, comparisons, judgements, strict=True):
        found[run.folder].append(_preference(row, comparison, judgement))
    calibration = agreement(config.calibration_pairs, judge.compare) if config.calibration_pairs else None
    facts: JudgeFacts = {
        "model": config.judge.model,
        "template": config.judge.template,
        "template_sha256": judge.template.sha256,
        **judge_facts(comparisons, judgements),
        "answers_to_the_judge": _addressing_answers(stored),
        "calibration": calibration,
        "cost": judge.cost(),
        "warnings": [],
    }
    facts["warnings"] = judge_warnings(config, stored, facts)
    write_json(stored.study / FACTS, facts)
    return found


def _comparison(stored: Stored, run: Run, row: PromptRow) -> Comparison:
    key = (row["split"], row["prompt_id"])
    first_turn = row.get("follows")
    if not first_turn:
        return Comparison(as_text(conversation(row, run.answers)), run.answers[key], stored.baseline[key])
    # A second turn is judged together with the same side's answer to the first turn.
    before = (row["split"], first_turn)
    asked = as_text([{"role": "user", "content": turn["content"]} for turn in row["prompt"]])
    answer, other = (
        f"[first turn]\n{answers.get(before, '')}\n\n[second turn]\n{answers[key]}"
        for answers in (run.answers, stored.baseline)
    )
    return Comparison(asked, answer, other)


def _preference(row: PromptRow, comparison: Comparison, judgement: Judgement) -> Preference:
    return Preference(
        row["split"],
        row["prompt_id"],
        judgement.score,
        len(comparison.answer),
        len(comparison.baseline),
        "" if judgement.score is not None else judgement.reason,
        {"shown_first": judgement.shown_first, "shown_second": judgement.shown_second, "note": judgement.reason},
    )


def _addressing_answers(stored: Stored) -> dict[str, int]:
    """Count the answers that address a judge, by run; runs without any are left out."""
    counts = {
        run.folder.name: sum(_ADDRESSES_JUDGE.search(answer) is not None for answer in run.answers.values())
        for run in stored.runs
    }
    return {name: count for name, count in counts.items() if count}


def agreement(reference: str, compare: Callable[[Sequence[Comparison]], list[Judgement]]) -> Agreement:
    """Judge pairs with known labels.

    Args:
        reference: a file of preference pairs, in any form that `data.golden` reads.
        compare: judges in both orders.

    Returns:
        The agreement, a contradiction counted as half, and its Wilson interval at 95%; contradictions make the
        interval too wide rather than too narrow.
    """
    limit = DataConfig().max_bad_fraction
    table = read_table(reference, key="score.calibration_pairs", revision=None, max_bad_fraction=limit)
    pairs = [pair for row in table.rows if (pair := row.pair()) is not None]
    scores = [found.score for found in compare([_labelled(pair) for pair in pairs]) if found.score is not None]
    share = fmean(scores) if scores else None
    return {
        "path": reference,
        "pairs": len(pairs),
        "unscored": len(pairs) - len(scores),
        "agreement": share,
        "ci95": None if share is None else list(wilson(share, len(scores))),
    }


def _labelled(pair: Pair) -> Comparison:
    chosen, rejected = (
        [says(turn["role"], part(turn["content"]).answer) for turn in answer] for answer in (pair.chosen, pair.rejected)
    )
    return Comparison(as_text(pair.prompt), as_text(chosen), as_text(rejected))


def wilson(share: float, count: int, level: float = 0.95) -> tuple[float, float]:
    """Return Wilson's score interval of a share of `count` cases (Wilson 1927)."""
    z = float(stats.norm.ppf((1 + level) / 2))
    centre = share + z * z / (2 * count)
    spread = z * (share * (1 - share) / count + z * z / (4 * count * count)) ** 0.5
    scale = 1 + z * z / count
    return (centre - spread) / scale, (centre + spread) / scale


def judge_warnings(config: ScoreConfig, stored: Stored, facts: JudgeFacts) -> list[str]:
    """Return the warnings about a judge that the report shows with the verdict."""
    found = list(_kinship_warnings(config, stored.study))
    flips, slot, longer = facts["flip_rate"], facts["first_slot_rate"], facts["longer_wins_rate"]
    if flips is not None and flips > _MAX_FLIPS:
        found.append(f"the judge contradicts itself on {flips:.0%} of the comparisons when the order changes")
    if slot is not None and abs(slot - 0.5) > _MAX_SLOT_BIAS:
        found.append(f"the judge prefers the answer shown first in {slot:.0%} of its verdicts (fair: 50%)")
    if longer is not None and not 1 - _MAX_LONGER_WINS <= longer <= _MAX_LONGER_WINS:
        found.append(f"the longer answer wins {longer:.0%} of the decided comparisons; see length_controlled")
    if facts["answers_to_the_judge"]:
        counts = ", ".join(f"{name} {count}" for name, count in facts["answers_to_the_judge"].items())
        found.append(f"answers that speak to the judge, by run: {counts}; read them before you trust its verdicts")
    known = facts["calibration"]
    if known and known["ci95"] and known["ci95"][0] <= 0.5:
        found.append(
            f"on {known['pairs']} pairs with known labels the judge agrees in {known['agreement']:.0%} "
            f"({known['ci95'][0]:.0%} to {known['ci95'][1]:.0%}): not shown to be better than a coin"
        )
    return found


def _kinship_warnings(config: ScoreConfig, study: Path) -> Iterator[str]:
    """Warn of a judge of the policy's family, and of one that labelled the pairs or is related to their labeller."""
    registered = read_study(study / "study.yaml")
    judge = config.judge.model
    own = family(judge)
    policy = str((registered.get("model") or {}).get("path", ""))
    if own and own == family(policy):
        yield f"the judge {judge} and the policy {policy} are of one family ({own}): models favour their own kind"
    pairs = str((registered.get("data", {}).get("train") or {}).get("path", "")).lower()
    labeller = config.labeller or next((who for name, who in _LABELLERS.items() if name in pairs), None)
    if labeller and judge and (labeller.lower() in judge.lower() or (own and own == family(labeller))):
        yield (
            f"the judge {judge} is, or is related to, {labeller}, which labelled the training pairs: the policies were "
            "trained to please it and are judged by it"
        )


def family(name: str | None) -> str | None:
    """Return the family in a model's name, or None."""
    found = (name or "").lower()
    return next((title for title, pattern in _FAMILIES.items() if re.search(pattern, found)), None)
