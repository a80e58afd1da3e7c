"""What is stored of a study's runs, as scorers that compare answers see it: the answers of each run, and a baseline's.

Trains nothing and generates nothing. Output of such a scorer: `preferences.jsonl` in each run's folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from harness.data.records import Message
from harness.score.scorers import Rows
from harness.study.errors import UsageError
from harness.study.files import read_jsonl, write_jsonl
from harness.study.manifest import Manifest, load_manifest

Key = tuple[str, str]  # split, prompt_id
_FILE = "preferences.jsonl"


@dataclass(frozen=True)
class Preference:
    """How an answer fares against the baseline's answer to the same prompt.

    Attributes:
        preference: in [0, 1]: 1 where the answer wins, 0.5 for a tie; None where there is none, with a reason.
        answer_chars: length of the answer; baseline_chars: of the baseline's.
        details: what the scorer keeps beside it, such as raw rewards or the verdict in each order.
    """

    split: str
    prompt_id: str
    preference: float | None
    answer_chars: int
    baseline_chars: int
    reason: str = ""
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """One run's folder, manifest and answers; the SFT base is one as well."""

    folder: Path
    manifest: Manifest
    answers: Mapping[Key, str]

    @property
    def failed(self) -> str:
        """`diverged` or `collapsed` where the run scores worst whatever it answers, else empty."""
        return next(iter(self.manifest.get("flags", [])), "")


@dataclass(frozen=True)
class Stored:
    """The stored answers of a study.

    Attributes:
        splits: those that are scored.
        prompts: their rows of prompts.jsonl.
        baseline: the answers that are compared with.
        runs: the base first.
    """

    study: Path
    splits: tuple[str, ...]
    prompts: Rows
    baseline: Mapping[Key, str]
    runs: tuple[Run, ...]

    def of_run(self, run: Run) -> list[dict[str, Any]]:
        """Return the rows of the prompts that the run has answered."""
        return [row for row in self.prompts if (row["split"], row["prompt_id"]) in run.answers]


def conversation(row: Mapping[str, Any], answers: Mapping[Key, str]) -> list[Message]:
    """Return the turns before the answer; where a prompt follows another, the answer to that one stands in between."""
    turns: list[Message] = [dict(turn) for turn in row["prompt"]]  # type: ignore[misc]
    if row.get("follows"):
        said: Message = {"role": "assistant", "content": answers.get((row["split"], row["follows"]), "")}
        turns.insert(-1, said)
    return turns


def as_text(turns: Sequence[Message]) -> str:
    """Write a conversation as a judge reads it: the text alone where there is one turn."""
    if len(turns) == 1:
        return turns[0]["content"]
    return "\n\n".join(f"[{turn['role']}]\n{turn['content']}" for turn in turns)


def read_stored(study: Path, folders: Sequence[Path], splits: Sequence[str], baseline: Mapping[str, str]) -> Stored:
    """Read what is stored.

    Args:
        study: its folder.
        folders: of the runs, the base's first.
        splits: those that are scored.
        baseline: answers by prompt_id that were given in a file; empty for the base's.

    Raises:
        UsageError: where the baseline lacks a prompt.
    """
    prompts = [row for row in read_jsonl(study / "prompts.jsonl") if row["split"] in splits]
    runs = [Run(folder, load_manifest(folder), _answers(folder, splits)) for folder in folders]
    known = runs[0].answers
    if baseline:
        known = {(r["split"], r["prompt_id"]): baseline[r["prompt_id"]] for r in prompts if r["prompt_id"] in baseline}
    lacking = [key for run in runs[1:] for key in run.answers if key not in known]
    if lacking:
        raise UsageError(
            f"score.baseline: no answer to {len(set(lacking))} prompts that the policies answered (first: "
            f"{lacking[0][1]}); give a file that answers every prompt, or leave it out to compare with the SFT base"
        )
    return Stored(study, tuple(splits), prompts, known, tuple(runs))


def _answers(folder: Path, splits: Sequence[str]) -> dict[Key, str]:
    path = folder / "completions.jsonl"
    rows = read_jsonl(path) if path.is_file() else ()
    return {(row["split"], row["prompt_id"]): row["completion"] for row in rows if row["split"] in splits}


def write_preferences(folder: Path, scorer: str, found: Sequence[Preference], splits: Sequence[str]) -> None:
    """Keep a scorer's preferences in a run's folder, in place of its earlier ones of these splits."""
    path = folder / _FILE
    rows = list(read_jsonl(path)) if path.is_file() else []
    old = [row for row in rows if row["scorer"] != scorer or row["split"] not in splits]
    write_jsonl(path, [*old, *({"scorer": scorer, **asdict(one)} for one in found)])


def read_preferences(folder: Path, scorer: str) -> list[Preference]:
    """Return what a scorer has kept; empty where it has not scored this run."""
    path = folder / _FILE
    rows = [row for row in read_jsonl(path) if row["scorer"] == scorer] if path.is_file() else []
    return [Preference(**{key: value for key, value in row.items() if key != "scorer"}) for row in rows]
