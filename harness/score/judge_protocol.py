"""The judge's protocol: two answers -> prompts in both orders -> replies -> a score in [0, 1]; facts about the judge.

Templates: `conf/judge/`. Answers are hostile text: placeholders are filled in one pass, and no answer can forge the
marks around it.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, TypedDict

import yaml

from harness.config.paths import CONF
from harness.data.reasoning import part
from harness.data.records import Message
from harness.score.judge_endpoint import Endpoint, Reply, estimate
from harness.study.errors import UsageError
from harness.study.files import digest
from harness.study.text import one_line

if TYPE_CHECKING:
    from openai.types.shared_params import ResponseFormatJSONSchema

_PLACEHOLDER = re.compile(r"\{(instruction|first|second|mark)\}")
_KEYS = {"system", "user", "pattern", "verdicts"}
_NEEDED = ("{instruction}", "{first}", "{second}")


@dataclass(frozen=True)
class Template:
    """A prompt for two answers, and the verdicts that it allows.

    Attributes:
        system: text of the system turn; may be empty.
        user: text of the user's turn.
        pattern: its group matches a verdict in a reply; the last match counts.
        verdicts: score in [0, 1] of the answer shown first, by verdict.
        sha256: of all of these.
    """

    system: str
    user: str
    pattern: re.Pattern[str]
    verdicts: dict[str, float]
    sha256: str

    def messages(self, instruction: str, first: str, second: str) -> list[Message]:
        """Return the turns to send, with `first` and `second` in the places of the two answers."""
        filled = {"instruction": instruction, "first": first, "second": second}
        # A mark that the texts do not contain, and the same in every run: replies are cached by their prompt.
        mark = digest(filled)[:12]
        filled["mark"] = mark

        def fill(text: str) -> str:
            return _PLACEHOLDER.sub(lambda match: filled[match[1]], text).rstrip("\n")

        system: list[Message] = [{"role": "system", "content": fill(self.system)}] if self.system else []
        return [*system, {"role": "user", "content": fill(self.user)}]

    def score(self, reply: str) -> float | None:
        """Return the score of the answer shown first, or None where the reply is no verdict.

        A reply in the schema's form is JSON with one key, `verdict`. What a judge says while it thinks is no verdict.
        """
        reply = part(reply).answer
        try:
            given = json.loads(reply)
        except (ValueError, RecursionError):
            given = None
        if isinstance(given, dict):
            verdict = given.get("verdict")
            return self.verdicts.get(verdict) if isinstance(verdict, str) else None
        found = self.pattern.findall(reply)
        return self.verdicts.get(found[-1]) if found else None

    @property
    def schema(self) -> ResponseFormatJSONSchema:
        """The response format that limits a reply to one of the verdicts (OpenAI's `json_schema`)."""
        return {
            "type": "json_schema",
            "json_schema": {
                "name": "verdict",
                "schema": {
                    "type": "object",
                    "properties": {"verdict": {"type": "string", "enum": list(self.verdicts)}},
                    "required": ["verdict"],
                    "additionalProperties": False,
                },
                "strict": True,
            },
        }


def shipped_templates() -> list[str]:
    """Return the names of the templates in `conf/judge/`."""
    return sorted(file.stem for file in (CONF / "judge").glob("*.yaml"))


def template_path(name: str) -> Path:
    """Return the file of a template: a name in `conf/judge/`, or a path."""
    return CONF / "judge" / f"{name}.yaml" if name in shipped_templates() else Path(name)


def load_template(name: str) -> Template:
    """Read a template.

    Raises:
        UsageError: for an unknown name, a file of another form, or verdicts with one possible winner.
    """
    path, key = template_path(name), f"score.judge.template={name}"
    if not path.is_file():
        known = ", ".join(shipped_templates())
        raise UsageError(f"{key}: no such template; allowed: {known}, or a file of that form")
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(given, dict) or set(given) != _KEYS:
            raise ValueError(f"needs the keys {', '.join(sorted(_KEYS))}")
        pattern = re.compile(given["pattern"])
        verdicts = {str(verdict): float(score) for verdict, score in given["verdicts"].items()}
    except (ValueError, TypeError, AttributeError, re.error, yaml.YAMLError) as error:
        raise UsageError(f"{key}: {path} is no template ({error}); see conf/judge/alpacaeval.yaml") from error
    missing = [placeholder for placeholder in _NEEDED if placeholder not in given["user"]]
    if missing:
        raise UsageError(f"{key}: its `user` lacks {', '.join(missing)}; see conf/judge/alpacaeval.yaml")
    if pattern.groups != 1 or not verdicts or not all(0 <= score <= 1 for score in verdicts.values()):
        raise UsageError(f"{key}: `pattern` needs one group, and `verdicts` scores in [0, 1]")
    if not any(score > 0.5 for score in verdicts.values()) or not any(score < 0.5 for score in verdicts.values()):
        raise UsageError(f"{key}: `verdicts` must let either answer win: one above 0.5 and one below")
    return Template(str(given["system"] or ""), given["user"], pattern, verdicts, digest(given))


@dataclass(frozen=True)
class Comparison:
    """Two answers to one instruction."""

    instruction: str
    answer: str
    baseline: str


@dataclass(frozen=True)
class Judgement:
    """The judge's result on one comparison.

    Attributes:
        score: of `answer` against `baseline`: the mean over both orders, 0.5 where they contradict each other.
        shown_first: the answer's score where it was shown first; None without a verdict or without a request.
        shown_second: the same where it was shown second.
        reason: why there is no score; beside a score, why no request was needed.
        unreadable: number of replies that were no verdict.
    """

    score: float | None
    shown_first: float | None = None
    shown_second: float | None = None
    reason: str = ""
    unreadable: int = 0

    @property
    def flipped(self) -> bool:
        """Whether the two orders have different winners."""
        if self.shown_first is None or self.shown_second is None:
            return False
        return (self.shown_first - 0.5) * (self.shown_second - 0.5) < 0


def compare_all(comparisons: Sequence[Comparison], template: Template, endpoint: Endpoint) -> list[Judgement]:
    """Judge each comparison in both orders; equal comparisons are requested once."""
    known = {comparison: _judge_without_request(comparison) for comparison in comparisons}
    asked = [comparison for comparison, judgement in known.items() if judgement is None]
    prompts = [prompt for comparison in asked for prompt in _both_orders(comparison, template)]
    missing = [messages for messages in prompts if endpoint.stored(messages) is None]
    if missing:
        config = endpoint.config
        print(f"judge {config.model}: {len(asked):,} comparisons; {estimate(config, missing)}", file=sys.stderr)
    verdicts = _ask_for_verdicts(prompts, template, endpoint)
    for i, comparison in enumerate(asked):
        known[comparison] = _combine(verdicts[2 * i], verdicts[2 * i + 1])
    return [judgement for comparison in comparisons if (judgement := known[comparison]) is not None]


def _judge_without_request(comparison: Comparison) -> Judgement | None:
    """Judge equal texts as a tie and an empty text as the loser; None for other comparisons."""
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
    """The score of the answer shown first, or the reason why there is none."""

    score: float | None
    reason: str
    unreadable: int


def _ask_for_verdicts(prompts: Sequence[list[Message]], template: Template, endpoint: Endpoint) -> list[_Verdict]:
    """Ask each prompt; where a reply is no verdict, ask once more for the verdict alone."""
    found = [_read_reply(reply, template, 0) for reply in endpoint.ask(prompts)]
    again = [i for i, verdict in enumerate(found) if verdict.unreadable]
    if again:
        labels = ", ".join(template.verdicts)
        reminder: Message = {"role": "user", "content": f"Reply with your verdict and nothing else, one of: {labels}"}
        replies = endpoint.ask([_with_reminder(prompts[i], endpoint, reminder) for i in again])
        for i, reply in zip(again, replies, strict=True):
            found[i] = _read_reply(reply, template, 1)
    return found


def _with_reminder(messages: list[Message], endpoint: Endpoint, reminder: Message) -> list[Message]:
    """Append the unreadable reply and the reminder."""
    said: Message = {"role": "assistant", "content": endpoint.stored(messages) or ""}
    return [*messages, said, reminder]


def _read_reply(reply: Reply, template: Template, unreadable: int) -> _Verdict:
    if reply.text is None:
        return _Verdict(None, reply.reason, unreadable)
    score = template.score(reply.text)
    if score is None:
        return _Verdict(None, f"the judge's reply is no verdict: {one_line(reply.text, 60)!r}", unreadable + 1)
    return _Verdict(score, "", unreadable)


def _combine(first: _Verdict, second: _Verdict) -> Judgement:
    """Combine the verdicts of both orders; in `second` the answer was shown second."""
    unreadable = first.unreadable + second.unreadable
    shown_second = None if second.score is None else 1 - second.score
    if first.score is None or shown_second is None:
        return Judgement(None, first.score, shown_second, first.reason or second.reason, unreadable)
    judgement = Judgement((first.score + shown_second) / 2, first.score, shown_second, "", unreadable)
    return Judgement(0.5, first.score, shown_second, "", unreadable) if judgement.flipped else judgement


class ReplyFacts(TypedDict):
    """Facts about a judge out of its judgements; rates are shares in [0, 1], None without cases.

    Attributes:
        comparisons, unscored, unreadable_replies: numbers.
        flip_rate: comparisons with two verdicts whose orders have different winners.
        tie_rate: scored comparisons with score 0.5.
        first_slot_rate: decided verdicts for the answer shown first; 0.5 is fair.
        longer_wins_rate: decided comparisons of different lengths that the longer answer wins.
    """

    comparisons: int
    unscored: int
    unreadable_replies: int
    flip_rate: float | None
    tie_rate: float | None
    first_slot_rate: float | None
    longer_wins_rate: float | None


def judge_facts(comparisons: Sequence[Comparison], judgements: Sequence[Judgement]) -> ReplyFacts:
    """Return consistency and biases of a judge on these comparisons."""
    asked = [j for j in judgements if j.shown_first is not None and j.shown_second is not None]
    slots = [s > 0.5 for j in judgements for s in _first_slot_scores(j) if s != 0.5]
    longer = [
        (j.score > 0.5) == (len(c.answer) > len(c.baseline))
        for c, j in zip(comparisons, judgements, strict=True)
        if j.score not in (None, 0.5) and j.shown_first is not None and len(c.answer) != len(c.baseline)
    ]
    return {
        "comparisons": len(judgements),
        "unscored": sum(j.score is None for j in judgements),
        "unreadable_replies": sum(j.unreadable for j in judgements),
        "flip_rate": _rate([j.flipped for j in asked]),
        "tie_rate": _rate([j.score == 0.5 for j in judgements if j.score is not None]),
        "first_slot_rate": _rate(slots),
        "longer_wins_rate": _rate(longer),
    }


def _first_slot_scores(judgement: Judgement) -> list[float]:
    """Return the score of the answer shown first, for each order with a verdict."""
    first = [] if judgement.shown_first is None else [judgement.shown_first]
    return first + ([] if judgement.shown_second is None else [1 - judgement.shown_second])


def _rate(cases: Sequence[bool]) -> float | None:
    return fmean(cases) if cases else None
