"""Accuracy scorers of one trial: verifiable checks of its answers, and preference accuracy on held-out pairs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from statistics import fmean

from harness.data.checks import failed_checks
from harness.score.answers import Key, Score, TrialOutputs
from harness.study.rows import PairRow


def score_checks(outputs: TrialOutputs) -> list[Score]:
    """Score 1 where a completion passes all checks of its prompt, else 0."""
    return [Score(*key, float(failed == 0)) for key, failed, _ in _failed_checks(outputs)]


def score_checks_fraction(outputs: TrialOutputs) -> list[Score]:
    """Score the share of a prompt's checks that the completion passes."""
    return [Score(*key, 1 - failed / total) for key, failed, total in _failed_checks(outputs)]


def _failed_checks(outputs: TrialOutputs) -> Iterator[tuple[Key, int, int]]:
    """Yield per checked completion its key, its number of failed checks and its number of checks."""
    by_prompt = {(row["split"], row["prompt_id"]): row["checks"] for row in outputs.prompts}
    for row in outputs.completions:
        key = (row["split"], row["prompt_id"])
        if checks := by_prompt.get(key):
            yield key, len(failed_checks(row["completion"], checks, ended=row["ended"])), len(checks)


def score_preference(outputs: TrialOutputs) -> list[Score]:
    """Score the mean accuracy under both rewards, so that neither arm is judged by its own reward alone."""
    return _score_pairs(outputs, lambda row: (_accuracy_of_sums(row) + _accuracy_of_means(row)) / 2)


def score_preference_sum(outputs: TrialOutputs) -> list[Score]:
    """Score whether the chosen answer has the higher reward of DPO: the summed log-ratio to the base."""
    return _score_pairs(outputs, _accuracy_of_sums)


def score_preference_mean(outputs: TrialOutputs) -> list[Score]:
    """Score whether the chosen answer has the higher reward of SimPO: the mean log-prob."""
    return _score_pairs(outputs, _accuracy_of_means)


def _score_pairs(outputs: TrialOutputs, accuracy: Callable[[PairRow], float]) -> list[Score]:
    """Average the accuracies of each prompt's pairs, since prompts are the sampling units.

    A prompt whose pairs were all dropped at tokenisation is unscored.
    """
    by_prompt: dict[Key, list[float]] = defaultdict(list)
    for row in outputs.pairs:
        by_prompt[row["split"], row["prompt_id"]].append(accuracy(row))
    scored_splits = {split for split, _ in by_prompt}
    dropped = [
        Score(row["split"], row["prompt_id"], None, "all its pairs were dropped at tokenisation (see dropped_pairs)")
        for row in outputs.prompts
        if row["pairs"] and row["split"] in scored_splits and (row["split"], row["prompt_id"]) not in by_prompt
    ]
    return [Score(*key, fmean(values)) for key, values in by_prompt.items()] + dropped


def _accuracy_of_sums(row: PairRow) -> float:
    chosen = row["chosen_sum_logps"] - row["chosen_ref_sum_logps"]
    return _accuracy(chosen, row["rejected_sum_logps"] - row["rejected_ref_sum_logps"])


def _accuracy_of_means(row: PairRow) -> float:
    chosen = row["chosen_sum_logps"] / row["chosen_tokens"]
    return _accuracy(chosen, row["rejected_sum_logps"] / row["rejected_tokens"])


def _accuracy(chosen: float, rejected: float) -> float:
    return 0.5 if chosen == rejected else float(chosen > rejected)
