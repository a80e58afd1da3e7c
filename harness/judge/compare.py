"""Compare pairs of answers in both orders: two texts in, the first one's score in [0, 1] out."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from harness.judge.budget import estimate
from harness.judge.endpoint import Endpoint, Reply
from harness.judge.template import Template
from harness.records import Message
from harness.untrusted import one_line


@dataclass(frozen=True)
class Comparison:
    """Two answers to one instruction."""

    instruction: str
    answer: str
    baseline: str


@dataclass(frozen=True)
class Judgement:
    """What the judge made of a comparison.

    Attributes:
        score: of `answer` against `baseline`: the mean over both orders, 0.5 where they contradict each other.
        shown_first: the answer's score where it was shown first; None without a verdict, or where nobody was asked.
        shown_second: the same where it was shown second.
        reason: why there is no score; or, beside a score, why nobody had to be asked.
        unreadable: replies that were no verdict.
    """

    score: float | None
    shown_first: float | None = None
    shown_second: float | None = None
    reason: str = ""
    unreadable: int = 0

    @property
    def flipped(self) -> bool:
        """Whether each order has another winner."""
        if self.shown_first is None or self.shown_second is None:
            return False
        return (self.shown_first - 0.5) * (self.shown_second - 0.5) < 0


def compare_all(comparisons: Sequence[Comparison], template: Template, endpoint: Endpoint) -> list[Judgement]:
    """Judge every comparison; equal ones, and those that need no judge, are not asked for twice or at all."""
    known = {comparison: _without_asking(comparison) for comparison in comparisons}
    asked = [comparison for comparison, judgement in known.items() if judgement is None]
    prompts = [prompt for c in asked for prompt in _both_orders(c, template)]
    missing = [messages for messages in prompts if endpoint.stored(messages) is None]
    if missing:
        config = endpoint.config
        print(f"judge {config.model}: {len(asked):,} comparisons; {estimate(config, missing)}", file=sys.stderr)
    verdicts = _verdicts(prompts, template, endpoint)
    for i, comparison in enumerate(asked):
        known[comparison] = _judgement(verdicts[2 * i], verdicts[2 * i + 1])
    return [judgement for comparison in comparisons if (judgement := known[comparison]) is not None]


def _without_asking(comparison: Comparison) -> Judgement | None:
    """Judge what needs no judge: the same text, and no text at all, which loses whatever a judge would say of it."""
    answer, baseline = comparison.answer.strip(), comparison.baseline.strip()
    if answer == baseline:
        return Judgement(0.5, reason="both answers are the same")
    if not answer or not baseline:
        return Judgement(float(bool(answer)), reason="one answer is empty")
    return None


def _both_orders(comparison: Comparison, template: Template) -> tuple[list[Message], list[Message]]:
    instruction, answer, baseline = comparison.instruction, comparison.answer, comparison.baseline
    return template.messages(instruction, answer, baseline), template.messages(instruction, baseline, answer)


@dataclass(frozen=True)
class _Verdict:
    """The score of the answer shown first, or why there is none."""

    score: float | None
    reason: str
    unreadable: int


def _verdicts(prompts: Sequence[list[Message]], template: Template, endpoint: Endpoint) -> list[_Verdict]:
    """Ask, and ask once more for the verdict alone where a reply holds none."""
    found = [_read(reply, template, 0) for reply in endpoint.ask(prompts)]
    again = [i for i, verdict in enumerate(found) if verdict.unreadable]
    if again:
        labels = ", ".join(template.verdicts)
        reminder: Message = {"role": "user", "content": f"Reply with your verdict and nothing else, one of: {labels}"}
        replies = endpoint.ask([_reminded(prompts[i], endpoint, reminder) for i in again])
        for i, reply in zip(again, replies, strict=True):
            found[i] = _read(reply, template, 1)
    return found


def _reminded(messages: list[Message], endpoint: Endpoint, reminder: Message) -> list[Message]:
    """Return the conversation with the unreadable reply in it."""
    said: Message = {"role": "assistant", "content": endpoint.stored(messages) or ""}
    return [*messages, said, reminder]


def _read(reply: Reply, template: Template, unreadable: int) -> _Verdict:
    if reply.text is None:
        return _Verdict(None, reply.reason, unreadable)
    score = template.score(reply.text)
    if score is None:
        return _Verdict(None, f"the judge's reply is no verdict: {one_line(reply.text, 60)!r}", unreadable + 1)
    return _Verdict(score, "", unreadable)


def _judgement(first: _Verdict, second: _Verdict) -> Judgement:
    unreadable = first.unreadable + second.unreadable
    shown_second = None if second.score is None else 1 - second.score
    if first.score is None or shown_second is None:
        return Judgement(None, first.score, shown_second, first.reason or second.reason, unreadable)
    judgement = Judgement((first.score + shown_second) / 2, first.score, shown_second, "", unreadable)
    return Judgement(0.5, first.score, shown_second, "", unreadable) if judgement.flipped else judgement


def judge_facts(comparisons: Sequence[Comparison], judgements: Sequence[Judgement]) -> dict[str, Any]:
    """Return what the judgements say of the judge, as shares of what each is a share of.

    Returns:
        `comparisons`, `unscored`, `unreadable_replies`, `flip_rate` (both orders answered, and each another winner),
        `tie_rate`, `first_slot_rate` (decided replies that prefer what was shown first; 0.5 is fair),
        `longer_wins_rate` (decided comparisons of different lengths that the longer answer wins); None without cases.
    """
    asked = [j for j in judgements if j.shown_first is not None and j.shown_second is not None]
    slots = [s > 0.5 for j in judgements for s in _slots(j) if s != 0.5]
    longer = [
        (j.score > 0.5) == (len(c.answer) > len(c.baseline))
        for c, j in zip(comparisons, judgements, strict=True)
        if j.score not in (None, 0.5) and j.shown_first is not None and len(c.answer) != len(c.baseline)
    ]
    return {
        "comparisons": len(judgements),
        "unscored": sum(j.score is None for j in judgements),
        "unreadable_replies": sum(j.unreadable for j in judgements),
        "flip_rate": _share([j.flipped for j in asked]),
        "tie_rate": _share([j.score == 0.5 for j in judgements if j.score is not None]),
        "first_slot_rate": _share(slots),
        "longer_wins_rate": _share(longer),
    }


def _slots(judgement: Judgement) -> list[float]:
    """Return the score of what was shown first, for each order that has a verdict."""
    first = [] if judgement.shown_first is None else [judgement.shown_first]
    return first + ([] if judgement.shown_second is None else [1 - judgement.shown_second])


def _share(cases: Sequence[bool]) -> float | None:
    return fmean(cases) if cases else None


def as_row(judgement: Judgement) -> dict[str, Any]:
    """Return a judgement as a row of a JSON-lines file."""
    return asdict(judgement)
