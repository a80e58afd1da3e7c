"""What a judge is asked, and how its reply is read: templates of `conf/judge/`.

Answers are hostile text: each placeholder is filled once, in one pass, and no answer can write the marks around it.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from harness.config.paths import CONF
from harness.data.records import Message
from harness.score.judge_endpoint import Endpoint, Reply, estimate
from harness.study.errors import UsageError
from harness.study.files import digest
from harness.study.text import one_line

_PLACEHOLDER = re.compile(r"\{(instruction|first|second|mark)\}")
_KEYS = {"system", "user", "pattern", "verdicts"}
_NEEDED = ("{instruction}", "{first}", "{second}")


@dataclass(frozen=True)
class Template:
    """A judge's prompt.

    Attributes:
        system: text of the system turn; may be empty.
        user: text of the user's turn.
        pattern: finds the verdict in a reply; its group is the verdict, and the last match counts.
        verdicts: the score in [0, 1] of the answer that was shown first, by verdict.
        sha256: of all of these.
    """

    system: str
    user: str
    pattern: re.Pattern[str]
    verdicts: dict[str, float]
    sha256: str

    def messages(self, instruction: str, first: str, second: str) -> list[Message]:
        """Return the turns to send."""
        filled = {"instruction": instruction, "first": first, "second": second}
        # A code that the texts do not hold, the same each time: replies are cached by what was asked.
        mark = digest(filled)[:12]
        filled["mark"] = mark

        def fill(text: str) -> str:
            return _PLACEHOLDER.sub(lambda match: filled[match[1]], text).rstrip("\n")

        system: list[Message] = [{"role": "system", "content": fill(self.system)}] if self.system else []
        return [*system, {"role": "user", "content": fill(self.user)}]

    def score(self, reply: str) -> float | None:
        """Return the score of the answer that was shown first, or None where the reply is no verdict.

        A reply that was held to the schema is JSON with one key, `verdict`.
        """
        try:
            given = json.loads(reply)
        except ValueError:
            given = None
        if isinstance(given, dict):
            verdict = given.get("verdict")
            return self.verdicts.get(verdict) if isinstance(verdict, str) else None
        found = self.pattern.findall(reply)
        return self.verdicts.get(found[-1]) if found else None

    @property
    def schema(self) -> dict[str, Any]:
        """The response format that holds a reply to one of the verdicts (OpenAI's `json_schema`)."""
        verdict = {"type": "string", "enum": list(self.verdicts)}
        schema = {
            "type": "object",
            "properties": {"verdict": verdict},
            "required": ["verdict"],
            "additionalProperties": False,
        }
        return {"type": "json_schema", "json_schema": {"name": "verdict", "schema": schema, "strict": True}}


def shipped_templates() -> list[str]:
    """Return the names of the templates in `conf/judge/`."""
    return sorted(file.stem for file in (CONF / "judge").glob("*.yaml"))


def template_path(name: str) -> Path:
    """Return the file of a template: one of `conf/judge/`, or one of your own."""
    return CONF / "judge" / f"{name}.yaml" if name in shipped_templates() else Path(name)


def load_template(name: str) -> Template:
    """Read a template.

    Raises:
        UsageError: for an unknown name, a file that is no template, or verdicts that the pattern cannot find.
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
