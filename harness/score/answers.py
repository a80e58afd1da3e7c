"""Inputs and results of scorers: stored answers in; scores in [0, 1] and preferences out.

Reads prompts.jsonl of the study, completions.jsonl and pairs.jsonl per run, and answer files of other tools.
Writes preferences.jsonl per run. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from harness.config.schema import ScoreConfig
from harness.data.records import Message
from harness.data.sources import read_source
from harness.study.errors import UsageError
from harness.study.files import FileCache, read_jsonl, write_jsonl
from harness.study.manifest import Manifest, load_manifest
from harness.study.rows import CompletionRow, PairRow, PromptRow

Key = tuple[str, str]  # split, prompt_id
FORMS = (
    "our completions.jsonl (`prompt_id`, `completion`)",
    "AlpacaEval's model_outputs.json (`instruction`, `output`)",
    "Arena-Hard's model_answer/MODEL.jsonl (`question_id` with `choices`, or `uid` with `messages`)",
)
_PREFERENCES = "preferences.jsonl"


@dataclass(frozen=True)
class TrialOutputs:
    """The stored outputs of one run, as a scorer of one trial reads them.

    Attributes:
        prompts: rows of the study's prompts.jsonl (`split`, `prompt_id`, `prompt`, `checks`, `cluster`, `pairs`).
        completions: rows of completions.jsonl.
        pairs: rows of pairs.jsonl: log-probs of held-out pairs.
    """

    prompts: list[PromptRow]
    completions: list[CompletionRow]
    pairs: list[PairRow]


@dataclass(frozen=True)
class Score:
    """A score in [0, 1] for one prompt; None with a reason where there is none."""

    split: str
    prompt_id: str
    score: float | None
    unscored_reason: str = ""


@dataclass(frozen=True)
class Preference:
    """An answer compared with the baseline's answer to the same prompt.

    Attributes:
        preference: in [0, 1]: 1 for a win, 0.5 for a tie; None with a reason where there is none.
        answer_chars, baseline_chars: lengths of the two answers.
        details: facts kept beside it, such as raw rewards or the verdict of each order.
    """

    split: str
    prompt_id: str
    preference: float | None
    answer_chars: int
    baseline_chars: int
    reason: str = ""
    details: dict[str, float | str | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """Folder, manifest and answers of one run; the SFT base is a run, too."""

    folder: Path
    manifest: Manifest
    answers: Mapping[Key, str]

    @property
    def failed(self) -> str:
        """`diverged` or `collapsed` where the run scores as worst whatever it answers, else empty."""
        return next(iter(self.manifest.get("flags", [])), "")

    @property
    def title(self) -> str:
        """Arm and seed, for messages."""
        return f"{self.manifest['arm']} seed {self.manifest['seed']}"


@dataclass(frozen=True)
class Stored:
    """The stored answers of a study, as a scorer of the whole study reads them.

    Attributes:
        study: its folder.
        splits: the splits to score.
        prompts: rows of prompts.jsonl of these splits.
        baseline: the answers to compare with.
        runs: the base first.
    """

    study: Path
    splits: tuple[str, ...]
    prompts: list[PromptRow]
    baseline: Mapping[Key, str]
    runs: tuple[Run, ...]

    def cases(self) -> list[tuple[Run, PromptRow]]:
        """Return each answered prompt of each run that does not score as worst already."""
        return [
            (run, row)
            for run in self.runs
            if not run.failed
            for row in self.prompts
            if (row["split"], row["prompt_id"]) in run.answers
        ]


@dataclass(frozen=True)
class Base:
    """The SFT base whose weights a benchmark loads: its folder, a chat template file, and whether to load 4 bits."""

    folder: Path
    chat_template: str | None
    is_quantised: bool


@dataclass(frozen=True)
class Scoring:
    """The settings of one scoring of a study.

    Attributes:
        config: the group `score` of the config.
        names: the scorers to run: names in the table of scorers, and Python files.
        splits: the splits to score.
        cache: folder of cached replies and rewards, shared by all studies.
        base: None where no scorer loads weights.
    """

    config: ScoreConfig
    names: Sequence[str]
    splits: Sequence[str]
    cache: Path
    base: Base | None


def rows_if_any(path: Path, files: FileCache | None = None) -> list[Any]:
    """Return the rows of a JSONL file; empty where there is no file."""
    return list(read_jsonl(path, files)) if path.is_file() else []


def outputs_of(folder: Path, prompts: list[PromptRow], files: FileCache | None = None) -> TrialOutputs:
    """Read the stored outputs of a run."""
    completions, pairs = (rows_if_any(folder / name, files) for name in ("completions.jsonl", "pairs.jsonl"))
    return TrialOutputs(prompts, completions, pairs)


def read_stored(study: Path, folders: Sequence[Path], splits: Sequence[str], baseline: Mapping[str, str]) -> Stored:
    """Read the stored answers of a study.

    Args:
        study: its folder.
        folders: of the runs, the base's first.
        splits: the splits to score.
        baseline: answers by prompt_id out of a file; empty to compare with the base's.

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
    rows: list[CompletionRow] = rows_if_any(folder / "completions.jsonl")
    return {(row["split"], row["prompt_id"]): row["completion"] for row in rows if row["split"] in splits}


def conversation(row: PromptRow, answers: Mapping[Key, str]) -> list[Message]:
    """Return the turns before the answer; a second turn gets the answer to the first in between."""
    turns: list[Message] = [{"role": turn["role"], "content": turn["content"]} for turn in row["prompt"]]
    if before := row.get("follows"):
        turns.insert(-1, {"role": "assistant", "content": answers.get((row["split"], before), "")})
    return turns


def as_text(turns: Sequence[Message]) -> str:
    """Format a conversation for a judge: the text alone for a single turn."""
    if len(turns) == 1:
        return turns[0]["content"]
    return "\n\n".join(f"[{turn['role']}]\n{turn['content']}" for turn in turns)


def write_preferences(folder: Path, scorer: str, found: Sequence[Preference], splits: Sequence[str]) -> None:
    """Write a scorer's preferences of these splits into a run's folder; they replace its earlier ones."""
    path = folder / _PREFERENCES
    old = [row for row in rows_if_any(path) if row["scorer"] != scorer or row["split"] not in splits]
    write_jsonl(path, [*old, *({"scorer": scorer, **asdict(one)} for one in found)])


def read_preferences(folder: Path, scorer: str) -> list[Preference]:
    """Return the stored preferences of a scorer; empty where it has not scored this run."""
    rows = [row for row in rows_if_any(folder / _PREFERENCES) if row["scorer"] == scorer]
    return [Preference(**{key: value for key, value in row.items() if key != "scorer"}) for row in rows]


def read_outputs(path: str, prompts: Sequence[PromptRow], *, key: str) -> dict[str, str]:
    """Read answers from a file of this or another tool.

    Args:
        path: a file of one of `FORMS`.
        prompts: rows of prompts.jsonl.
        key: the config key or option that names the file, for messages.

    A prompt that is asked several times gets the answers in their order. Lone surrogates become U+FFFD.

    Returns:
        The whole answers by prompt_id, without answers to other prompts.

    Raises:
        UsageError: for an unknown form, an answer that is no text, or two answers to one prompt that differ.
    """
    known = {row["prompt_id"] for row in prompts}
    found: dict[str, str] = {}
    for number, name, given in _given_answers(path, prompts, key):
        if not isinstance(given, str):
            raise UsageError(f"{key}={path}: row {number}: the answer is of type {type(given).__name__}; allowed: text")
        answer = given.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if name is not None and name in known and found.setdefault(name, answer) != answer:
            raise UsageError(f"{key}={path}: row {number}: a second answer to the prompt {name}; keep one")
    if not found:
        raise UsageError(f"{key}={path}: answers none of the study's prompts; is it of another golden set?")
    return found


class _GivenAnswer(NamedTuple):
    """Row number, prompt_id (None for an unknown prompt), and the answer, which may be of any type."""

    number: int
    prompt_id: str | None
    answer: Any


class _Asked:
    """Ids of prompts by a name that several of them may share: they take turns, and the last one stays."""

    def __init__(self, names: Iterable[tuple[Hashable, str]]) -> None:
        self._left: dict[Hashable, list[str]] = {}
        for name, prompt in names:
            self._left.setdefault(name, []).append(prompt)

    def next(self, name: Hashable) -> str | None:
        """Return the next prompt of this name; None for an unknown one."""
        left = self._left.get(name)
        return None if left is None else left.pop(0) if len(left) > 1 else left[0]


def _asked_text(text: object) -> str:
    return str(text).strip()


def _given_answers(path: str, prompts: Sequence[PromptRow], key: str) -> Iterator[_GivenAnswer]:
    by_text = _Asked(
        (_asked_text(row["prompt"][-1]["content"]), row["prompt_id"]) for row in prompts if len(row["prompt"]) == 1
    )
    by_name = _Asked(
        ((str(row["about"]["id"]), row["about"].get("turn", 1)), row["prompt_id"]) for row in prompts if row["about"]
    )
    source = read_source(path, key=key)
    if source.bad_rows:
        raise UsageError(f"{key}: {source.bad_rows[0]}")
    for number, row in source.rows:
        if {"prompt_id", "completion"} <= row.keys():
            yield _GivenAnswer(number, row["prompt_id"], row["completion"])
        elif {"instruction", "output"} <= row.keys():
            yield _GivenAnswer(number, by_text.next(_asked_text(row["instruction"])), row["output"])
        elif {"question_id", "choices"} <= row.keys():
            for turn, said in enumerate(row["choices"][0]["turns"], start=1):
                name = by_name.next((str(row["question_id"]), turn))
                yield _GivenAnswer(number, name, said["content"] if isinstance(said, dict) else said)
        elif {"uid", "messages"} <= row.keys():
            said = row["messages"][-1]["content"]
            name = by_name.next((str(row["uid"]), 1))
            yield _GivenAnswer(number, name, said["answer"] if isinstance(said, dict) else said)
        else:
            forms = "".join(f"\n  {form}" for form in FORMS)
            columns = ", ".join(map(str, row))
            raise UsageError(f"{key}={path}: row {number} is of no known form (found: {columns}); allowed:{forms}")
