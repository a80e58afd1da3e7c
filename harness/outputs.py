"""Answers that were made elsewhere, by prompt: our completions.jsonl, AlpacaEval's and Arena-Hard's files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from harness.records import UsageError
from harness.sources import read_source

FORMS = (
    "our completions.jsonl (`prompt_id`, `completion`)",
    "AlpacaEval's model_outputs.json (`instruction`, `output`)",
    "Arena-Hard's model_answer/MODEL.jsonl (`question_id` with `choices`, or `uid` with `messages`)",
)


def read_outputs(path: str, prompts: Sequence[Mapping[str, Any]], *, key: str) -> dict[str, str]:
    """Return the answers of a file by prompt_id; those to other prompts are left out.

    Args:
        path: a file of one of `FORMS`.
        prompts: rows of prompts.jsonl.
        key: the config key or option that names the file, for messages.

    Raises:
        UsageError: for an unknown form, an answer that is no text, or two answers to one prompt that differ.
    """
    by_text = {row["prompt"][-1]["content"].strip(): row["prompt_id"] for row in prompts if len(row["prompt"]) == 1}
    by_name = {
        (str(row["about"]["id"]), row["about"].get("turn", 1)): row["prompt_id"] for row in prompts if row["about"]
    }
    known = {row["prompt_id"] for row in prompts}
    found: dict[str, str] = {}
    for number, name, answer in _rows(path, key, by_text, by_name):
        if not isinstance(answer, str):
            raise UsageError(
                f"{key}={path}: row {number}: the answer is of type {type(answer).__name__}; allowed: text"
            )
        if name is not None and name in known and found.setdefault(name, answer) != answer:
            raise UsageError(f"{key}={path}: row {number}: a second answer to the prompt {name}; keep one")
    if not found:
        raise UsageError(f"{key}={path}: answers none of the study's prompts; is it of another golden set?")
    return found


def _rows(
    path: str, key: str, by_text: Mapping[str, str], by_name: Mapping[tuple[str, int], str]
) -> Iterator[tuple[int, str | None, Any]]:
    source = read_source(path, key=key)
    if source.bad_rows:
        raise UsageError(f"{key}: {source.bad_rows[0]}")
    for number, row in source.rows:
        if {"prompt_id", "completion"} <= row.keys():
            yield number, row["prompt_id"], row["completion"]
        elif {"instruction", "output"} <= row.keys():
            yield number, by_text.get(str(row["instruction"]).strip()), row["output"]
        elif {"question_id", "choices"} <= row.keys():
            for turn, said in enumerate(row["choices"][0]["turns"], start=1):
                name = by_name.get((str(row["question_id"]), turn))
                yield number, name, said["content"] if isinstance(said, dict) else said
        elif {"uid", "messages"} <= row.keys():
            said = row["messages"][-1]["content"]
            yield number, by_name.get((str(row["uid"]), 1)), said["answer"] if isinstance(said, dict) else said
        else:
            forms = "".join(f"\n  {form}" for form in FORMS)
            columns = ", ".join(map(str, row))
            raise UsageError(f"{key}={path}: row {number} is of no known form (found: {columns}); allowed:{forms}")


def alpaca_eval_rows(
    prompts: Sequence[Mapping[str, Any]], answers: Mapping[str, str], generator: str
) -> list[dict[str, str]]:
    """Return AlpacaEval's model_outputs: one object a prompt, in the order of the golden file."""
    return [
        {
            "dataset": row["about"].get("dataset", ""),
            "instruction": row["prompt"][-1]["content"],
            "output": answers[row["prompt_id"]],
            "generator": generator,
        }
        for row in prompts
        if row["prompt_id"] in answers and not row.get("follows")
    ]


def arena_hard_rows(
    prompts: Sequence[Mapping[str, Any]], answers: Mapping[str, str], generator: str, tokens: Mapping[str, int]
) -> list[dict[str, Any]]:
    """Return the rows of Arena-Hard's model_answer file, of the version that the golden file is of."""
    rows = []
    for row in prompts:
        if row["prompt_id"] not in answers or row["about"].get("form") != "arena_hard":
            continue
        answer, name = answers[row["prompt_id"]], row["about"]["id"]
        metadata = {"token_len": tokens.get(row["prompt_id"], 0), **markdown_counts(answer)}
        if row["about"]["version"] == "v0.1":
            turns = [{"content": answer}]
            about = {"question_id": name, "answer_id": f"{generator}-{name}", "model_id": generator, "tstamp": 0.0}
            rows.append(about | {"choices": [{"index": 0, "turns": turns}], "conv_metadata": metadata})
        else:
            said = [{"role": "assistant", "content": {"answer": answer}}]
            about = {"uid": name, "ans_id": f"{generator}-{name}", "model": generator, "tstamp": 0.0}
            rows.append(about | {"messages": [*row["prompt"], *said], "metadata": metadata})
    return rows


def markdown_counts(text: str) -> dict[str, dict[str, int]]:
    """Count headings, list items and bold spans as Arena-Hard's style control does; what stands in code is left out."""
    text = re.sub("```([^`]*)```", "", text)
    headings = {f"h{n}": len(re.findall(rf"^#{{{n}}}\s", text, re.MULTILINE)) for n in range(1, 7)}
    items = {
        "ordered": len(re.findall(r"^\s*\d+\.\s", text, re.MULTILINE)),
        "unordered": len(re.findall(r"^\s*[-*+]\s", text, re.MULTILINE)),
    }
    bold = {"**": len(re.findall(r"\*\*[^*\n]+\*\*", text)), "__": len(re.findall(r"__[^_\n]+__", text))}
    return {"header_count": headings, "list_count": items, "bold_count": bold}


def dumps(rows: Sequence[Mapping[str, Any]], *, lines: bool) -> str:
    """Write rows as a JSON array, or one a line."""
    if lines:
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return json.dumps(list(rows), indent=2, ensure_ascii=False) + "\n"
