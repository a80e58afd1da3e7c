"""What a judge is asked, and how its reply is read: templates of `conf/judge/`.

Answers are hostile text: each placeholder is filled once, in one pass, and no answer can write the marks around it.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from harness.config import CONF
from harness.records import Message, UsageError, digest

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
