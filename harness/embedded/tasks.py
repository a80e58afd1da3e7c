"""The embedded study's tasks: short questions whose answers can be verified, and a sloppy way to answer them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

LETTERS = "abcdefghijklmnopqrstuvwxyz"
# Fillers share their first word, so that a policy which begins with it has not yet chosen among them.
BEFORE = ("well the answer is ", "well let me see it is ", "well i believe it is ")
AFTER = (" and i hope that helps", " and that is the answer")
WORDS = tuple(dict.fromkeys(" ".join([*BEFORE, *AFTER]).split()))

# How sloppy the demonstrations are. Fewer wrong ones would leave less to learn from preferences.
WRONG, PADDED_BEFORE, PADDED_AFTER = 0.15, 0.45, 0.3


@dataclass(frozen=True)
class Task:
    """A question and its right answer, which is one word."""

    kind: str
    prompt: str
    answer: str

    @property
    def checks(self) -> list[dict[str, Any]]:
        """Return the checks: the right answer stands there as a word, and no other word does."""
        return [{"regex": rf"\b{self.answer}\b"}, {"max_words": 1}]


def _letters(rng: np.random.Generator, count: int) -> str:
    return "".join(rng.choice(list(LETTERS), size=count, replace=False))


def _sort(rng: np.random.Generator) -> tuple[str, str]:
    text = _letters(rng, int(rng.integers(3, 5)))
    return text, "".join(sorted(text))


def _reverse(rng: np.random.Generator) -> tuple[str, str]:
    text = _letters(rng, int(rng.integers(3, 5)))
    return text, text[::-1]


def _add(rng: np.random.Generator) -> tuple[str, str]:
    left, right = rng.integers(0, 25, size=2)
    return f"{left}+{right}", str(left + right)


def _largest(rng: np.random.Generator) -> tuple[str, str]:
    numbers = rng.choice(100, size=3, replace=False)
    return " ".join(map(str, numbers)), str(max(numbers))


def _count(rng: np.random.Generator) -> tuple[str, str]:
    letter = str(rng.choice(list("abc")))
    text = "".join(rng.choice(list("abc"), size=6))
    return f"{letter} in {text}", str(text.count(letter))


KINDS: dict[str, Callable[[np.random.Generator], tuple[str, str]]] = {
    "sort": _sort,
    "reverse": _reverse,
    "add": _add,
    "largest": _largest,
    "count": _count,
}


def make_task(rng: np.random.Generator) -> Task:
    """Draw a task; all kinds are equally likely."""
    kind = str(rng.choice(list(KINDS)))
    question, answer = KINDS[kind](rng)
    return Task(kind, f"{kind} {question}", answer)


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
    answer = KINDS[task.kind](rng)[1] if rng.random() < WRONG else task.answer
    before = str(rng.choice(BEFORE)) if rng.random() < PADDED_BEFORE else ""
    after = str(rng.choice(AFTER)) if rng.random() < PADDED_AFTER else ""
    return f"{before}{answer}{after}"


def rank(task: Task, answer: str) -> tuple[bool, int]:
    """Rank an answer as the verifier does: right before wrong, then fewer words before more. Higher is better."""
    words = answer.split()
    return task.answer in words, -len(words)
