"""The scorers: what is stored of a trial in, one score in [0, 1] a prompt out. Higher is better. Imports no torch."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

from harness.data.checks import failed_checks
from harness.study.errors import UsageError

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class TrialOutputs:
    """What a scorer may look at.

    Attributes:
        prompts: rows of the study's prompts.jsonl (`split`, `prompt_id`, `prompt`, `checks`, `cluster`, `pairs`).
        completions: rows of completions.jsonl.
        pairs: rows of pairs.jsonl (`harness.data.records.PairLogps`).
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

Scorer = Callable[[TrialOutputs], list[Score]]


def is_file(name: str) -> bool:
    """Return True where a scorer is given as a file."""
    return name.endswith(".py")


def scorer_name(name: str) -> str:
    """Return the name that a scorer has in the scores: that of its file, without `.py`."""
    return Path(name).stem if is_file(name) else name


def own_scorer_problem(path: str) -> str | None:
    """Say why a file cannot be a scorer, as far as it shows without running it."""
    if not Path(path).is_file():
        return f"{path}: no such file; give a Python file with a function `score`"
    if not scorer_name(path).isidentifier() or scorer_name(path) in SCORERS:
        return f"{path}: a scorer is named by its file; choose a name that is an identifier and not yet a scorer's"
    return None


def load_scorer(path: str) -> Scorer:
    """Load a file's function `score`.

    Raises:
        UsageError: for no such file, one that fails, or one without the function.
    """
    problem = own_scorer_problem(path)
    if problem:
        raise UsageError(problem)
    spec = importlib.util.spec_from_file_location(f"own_scorer_{scorer_name(path)}", path)
    assert spec is not None, "a .py file has a loader"
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UsageError(f"{path}: fails when it is loaded ({type(error).__name__}: {error})") from error
    score = getattr(module, "score", None)
    if not callable(score):
        raise UsageError(f"{path}: has no function `score(outputs)`; see docs/scorers.md")

    def checked(outputs: TrialOutputs) -> list[Score]:
        try:
            found = list(score(outputs))
        except Exception as error:
            raise UsageError(f"{path}: score() failed ({type(error).__name__}: {error})") from error
        wrong = next((one for one in found if not isinstance(one, Score)), None)
        if wrong is not None:
            raise UsageError(f"{path}: score() returned {wrong!r}; allowed: a list of harness.scorers.Score")
        return found

    return checked


SENTENCES = "python -m nltk.downloader punkt_tab"
EXTRA = "pip install 'dpo-simpo-harness[lm-eval]'"
_METRICS = {"ifeval": "prompt_level_strict_acc", "ifeval_loose": "prompt_level_loose_acc"}


def ifeval_problem() -> str | None:
    """Say why instructions cannot be checked here, or None where they can."""
    missing = [name for name in ("lm_eval", "langdetect", "immutabledict", "nltk") if find_spec(name) is None]
    return f"{', '.join(missing)} not installed ({EXTRA})" if missing else None


@contextlib.contextmanager
def _no_download() -> Iterator[None]:
    """Keep lm-evaluation-harness from downloading at import: it does so in the first of several processes only."""
    rank = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = "1"
    try:
        yield
    finally:
        if rank is None:
            del os.environ["LOCAL_RANK"]
        else:
            os.environ["LOCAL_RANK"] = rank


def follows_instructions(scorer: str, instructions: Mapping[str, Any], prompt: str, answer: str) -> float:
    """Return 1.0 where the answer follows all instructions, else 0.0.

    Args:
        scorer: `ifeval` or `ifeval_loose`.
        instructions: `instruction_id_list` and `kwargs` of an IFEval row.
        prompt: its text.
        answer: the completion.

    Raises:
        LookupError: where an instruction needs NLTK's sentence data and it is not installed.
        KeyError: for an instruction that the installed version does not know.
    """
    with _no_download():
        from lm_eval.tasks.ifeval.utils import process_results
    import langdetect

    langdetect.DetectorFactory.seed = 0  # else the language of a short answer changes from run to run
    document = {"key": 0, "prompt": prompt, **instructions}
    return float(process_results(document, [answer])[_METRICS[scorer]])


def why_unchecked(error: Exception) -> str:
    """Say why instructions could not be checked."""
    if isinstance(error, KeyError):
        return f"the instruction {error} is not known to the installed lm-evaluation-harness"
    if isinstance(error, LookupError):
        return f"an instruction needs NLTK's sentence data ({SENTENCES})"
    return f"the instructions cannot be checked ({type(error).__name__}: {error})"


def unchecked(asked: Iterable[tuple[Mapping[str, Any], str]]) -> Counter[str]:
    """Count the (instructions, prompt) that cannot be checked on this machine, by reason."""
    found: Counter[str] = Counter()
    for instructions, prompt in asked:
        try:
            follows_instructions("ifeval", instructions, prompt, "Yes, it is.")
        except (LookupError, TypeError, ValueError) as error:
            found[why_unchecked(error)] += 1
    return found
