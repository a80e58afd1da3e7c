"""Accuracy scorers of one trial: verifiable checks of its answers, and preference accuracy on held-out pairs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from statistics import fmean
from typing import NamedTuple

from harness.data.checks import UncheckedError, failed_checks
from harness.score.answers import Key, Score, TrialOutputs
from harness.study.rows import PairRow


def score_checks(outputs: TrialOutputs) -> list[Score]:
    """Score 1 where a completion passes all checks of its prompt, else 0."""
    return [_score(found, lambda failed, total: float(failed == 0)) for found in _failed_checks(outputs)]


def score_checks_fraction(outputs: TrialOutputs) -> list[Score]:
    """Score the share of a prompt's checks that the completion passes."""
    return [_score(found, lambda failed, total: 1 - failed / total) for found in _failed_checks(outputs)]


class _Checked(NamedTuple):
    """A checked completion: its key, numbers of failed checks and of checks, and the check that took too long."""

    key: Key
    failed: int
    total: int
    unchecked: str


def _score(found: _Checked, score: Callable[[int, int], float]) -> Score:
    return Score(*found.key, None if found.unchecked else score(found.failed, found.total), found.unchecked)


def _failed_checks(outputs: TrialOutputs) -> Iterator[_Checked]:
    by_prompt = {(row["split"], row["prompt_id"]): row["checks"] for row in outputs.prompts}
    for row in outputs.completions:
        key = (row["split"], row["prompt_id"])
        if checks := by_prompt.get(key):
            try:
                failed, unchecked = failed_checks(row["completion"], checks, ended=row["ended"]), ""
            except UncheckedError as error:
                failed, unchecked = [], str(error)
            yield _Checked(key, len(failed), len(checks), unchecked)


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
