"""The embedded study's tasks: short questions whose answers can be verified, and a sloppy way to answer them.

Every kind has far more questions than the study uses, so that what is learned must carry over to questions not seen.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from harness.data.checks import failed_checks
from harness.data.records import Check

LETTERS = "abcdefghij"
# Fillers share their first word, so that a policy which begins with it has not yet chosen among them. No word of theirs
# may be a letter or a run of letters that a task can hold: words are single tokens.
BEFORE = ("well the answer is ", "well let me see it is ", "well my best guess is ")
AFTER = (" and so it must be", " and that is the answer")
WORDS = tuple(dict.fromkeys(" ".join([*BEFORE, *AFTER]).split()))

# How sloppy the demonstrations are. Fewer wrong or padded ones would leave less to learn from preferences.
WRONG, PADDED_BEFORE, PADDED_AFTER = 0.2, 0.45, 0.35


@dataclass(frozen=True)
class Task:
    """A question, its right answer, and a wrong answer that a careless teacher might give."""

    kind: str
    prompt: str
    answer: str
    slip: str

    @property
    def checks(self) -> list[Check]:
        """Return the checks of the golden file: the right answer stands there, and not a word more."""
        return [{"regex": rf"(?<!\S){re.escape(self.answer)}(?!\S)"}, {"max_words": len(self.answer.split())}]


Question = tuple[str, str, str]  # what is asked, right answer, slip


def _letters(rng: np.random.Generator, low: int, high: int) -> str:
    return "".join(rng.choice(list(LETTERS), size=int(rng.integers(low, high + 1)), replace=False))


def _near(rng: np.random.Generator, number: int) -> int:
    return number + 1 if number == 0 or rng.random() < 0.5 else number - 1


def _swapped(rng: np.random.Generator, text: str) -> str:
    """Exchange two neighbours, which differ."""
    i = int(rng.integers(len(text) - 1))
    return text[:i] + text[i + 1] + text[i] + text[i + 2 :]


def _sort(rng: np.random.Generator) -> Question:
    text = _letters(rng, 3, 4)
    answer = "".join(sorted(text))
    return text, answer, _swapped(rng, answer)


def _reverse(rng: np.random.Generator) -> Question:
    text = _letters(rng, 3, 5)
    return text, text[::-1], _swapped(rng, text[::-1])


def _add(rng: np.random.Generator) -> Question:
    left, right = (int(n) for n in rng.integers(1, 31, size=2))
    return f"{left}+{right}", str(left + right), str(_near(rng, left + right))


def _largest(rng: np.random.Generator) -> Question:
    numbers = [int(n) for n in rng.choice(100, size=3, replace=False)]
    return " ".join(map(str, numbers)), str(max(numbers)), str(sorted(numbers)[1])


def _count(rng: np.random.Generator) -> Question:
    letter = str(rng.choice(list("abc")))
    text = "".join(rng.choice(list("abc"), size=6))
    return f"{letter} in {text}", str(text.count(letter)), str(_near(rng, text.count(letter)))


def _spell(rng: np.random.Generator) -> Question:
    text = _letters(rng, 3, 4)
    return text, " ".join(text), " ".join(text[:-1])


KINDS: dict[str, Callable[[np.random.Generator], Question]] = {
    "sort": _sort,
    "reverse": _reverse,
    "add": _add,
    "largest": _largest,
    "count": _count,
    "spell": _spell,
}


def make_task(rng: np.random.Generator) -> Task:
    """Draw a task; all kinds are equally likely."""
    kind = str(rng.choice(list(KINDS)))
    question, answer, slip = KINDS[kind](rng)
    return Task(kind, f"{kind} {question}", answer, slip)


def make_tasks(rng: np.random.Generator, count: int, *, taken: set[str]) -> list[Task]:
    """Draw tasks whose prompts differ from each other and from all in `taken`, which grows by them."""
    tasks: list[Task] = []
    while len(tasks) < count:
        task = make_task(rng)
        if task.prompt not in taken:
            taken.add(task.prompt)
            tasks.append(task)
    return tasks


def demonstrate(task: Task, rng: np.random.Generator) -> str:
    """Answer a task as a sloppy teacher does: sometimes wrong, often padded with filler."""
    answer = task.slip if rng.random() < WRONG else task.answer
    before = str(rng.choice(BEFORE)) if rng.random() < PADDED_BEFORE else ""
    after = str(rng.choice(AFTER)) if rng.random() < PADDED_AFTER else ""
    return f"{before}{answer}{after}"


def rank(task: Task, answer: str) -> tuple[bool, int]:
    """Rank an answer as the verifier does: right before wrong, then the fewest words. Higher is better."""
    right, _ = task.checks
    return not failed_checks(answer, [right], ended=True), -len(answer.split())
