"""The scorers: what is stored of a trial in, one score in [0, 1] a prompt out. Higher is better. Imports no torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from harness.checks import failed_checks
from harness.ifeval import follows_instructions, ifeval_problem, why_unchecked

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class TrialOutputs:
    """What a scorer may look at.

    Attributes:
        prompts: rows of the study's prompts.jsonl (`split`, `prompt_id`, `prompt`, `checks`, `cluster`, `pairs`).
        completions: rows of completions.jsonl.
        pairs: rows of pairs.jsonl (`harness.records.PairLogps`).
    """

    prompts: Rows
    completions: Rows
    pairs: Rows


@dataclass(frozen=True)
class Score:
    """A score in [0, 1] for one prompt; None with a reason where there is none."""

    split: str
    prompt_id: str
    score: float | None
    unscored_reason: str = ""


def _checks(outputs: TrialOutputs) -> Iterable[tuple[dict[str, Any], int, int]]:
    by_prompt = {(row["split"], row["prompt_id"]): row["checks"] for row in outputs.prompts}
    for row in outputs.completions:
        checks = by_prompt.get((row["split"], row["prompt_id"])) or []
        if checks:
            yield row, len(failed_checks(row["completion"], checks, ended=row["ended"])), len(checks)


def score_checks(outputs: TrialOutputs) -> list[Score]:
    """Score 1 where a completion passes all checks of its prompt, else 0."""
    return [Score(row["split"], row["prompt_id"], float(failed == 0)) for row, failed, _ in _checks(outputs)]


def score_checks_fraction(outputs: TrialOutputs) -> list[Score]:
    """Score the share of a prompt's checks that the completion passes."""
    return [Score(row["split"], row["prompt_id"], 1 - failed / total) for row, failed, total in _checks(outputs)]


def _preference(outputs: TrialOutputs, accuracy: Callable[[dict[str, Any]], float]) -> list[Score]:
    """Average the accuracies of the pairs of one prompt: prompts are what is sampled, not pairs.

    A prompt of which no pair has log-probs, since all were dropped at tokenisation, is unscored and says so.
    """
    by_prompt: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in outputs.pairs:
        by_prompt[row["split"], row["prompt_id"]].append(accuracy(row))
    answered = {split for split, _ in by_prompt}
    dropped = [
        Score(row["split"], row["prompt_id"], None, "all its pairs were dropped at tokenisation (see dropped_pairs)")
        for row in outputs.prompts
        if row["pairs"] and row["split"] in answered and (row["split"], row["prompt_id"]) not in by_prompt
    ]
    return [Score(split, prompt_id, fmean(values)) for (split, prompt_id), values in by_prompt.items()] + dropped


def _prefers(chosen: float, rejected: float) -> float:
    return 0.5 if chosen == rejected else float(chosen > rejected)


def _sum_accuracy(row: dict[str, Any]) -> float:
    chosen = row["chosen_sum_logps"] - row["chosen_ref_sum_logps"]
    return _prefers(chosen, row["rejected_sum_logps"] - row["rejected_ref_sum_logps"])


def _mean_accuracy(row: dict[str, Any]) -> float:
    chosen = row["chosen_sum_logps"] / row["chosen_tokens"]
    return _prefers(chosen, row["rejected_sum_logps"] / row["rejected_tokens"])


def score_preference_sum(outputs: TrialOutputs) -> list[Score]:
    """Score whether the policy prefers the chosen answer by DPO's reward: the summed log-ratio to the base."""
    return _preference(outputs, _sum_accuracy)


def score_preference_mean(outputs: TrialOutputs) -> list[Score]:
    """Score whether the policy prefers the chosen answer by SimPO's reward: the mean log-prob."""
    return _preference(outputs, _mean_accuracy)


def score_preference(outputs: TrialOutputs) -> list[Score]:
    """Score the mean of both definitions, so that neither arm is judged by its own reward alone."""
    return _preference(outputs, lambda row: (_sum_accuracy(row) + _mean_accuracy(row)) / 2)


def _instructions(scorer: str, outputs: TrialOutputs) -> list[Score]:
    """Score answers to prompts with IFEval's instructions; where they cannot be checked here, not at all."""
    asked = {
        (row["split"], row["prompt_id"]): (row["about"]["instructions"], row["prompt"][-1]["content"])
        for row in outputs.prompts
        if row.get("about", {}).get("instructions")
    }
    scores = []
    for row in outputs.completions if asked and ifeval_problem() is None else ():
        key = (row["split"], row["prompt_id"])
        if key not in asked:
            continue
        try:
            scores.append(Score(*key, follows_instructions(scorer, *asked[key], row["completion"])))
        except (LookupError, TypeError, ValueError) as error:
            scores.append(Score(*key, None, why_unchecked(error)))
    return scores


def score_ifeval(outputs: TrialOutputs) -> list[Score]:
    """Score 1 where a completion follows all verifiable instructions of its prompt, else 0."""
    return _instructions("ifeval", outputs)


def score_ifeval_loose(outputs: TrialOutputs) -> list[Score]:
    """Score as `ifeval`, leaving out the first line, the last line and asterisks where that helps."""
    return _instructions("ifeval_loose", outputs)


SCORERS: dict[str, Callable[[TrialOutputs], list[Score]]] = {
    "checks": score_checks,
    "checks_fraction": score_checks_fraction,
    "ifeval": score_ifeval,
    "ifeval_loose": score_ifeval_loose,
    "preference_accuracy": score_preference,
    "preference_accuracy_sum": score_preference_sum,
    "preference_accuracy_mean": score_preference_mean,
}
