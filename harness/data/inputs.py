"""What a study's trials share: the splits and their token ids, loaded once in a process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from harness.config.checkpoint import checkpoint_dir
from harness.config.schema import EMBEDDED, RunConfig, Template
from harness.data.records import EvalPrompt
from harness.data.splits import DataSpec, Splits, load_splits
from harness.data.tokens import ChatFormat, TokenisedPairs, load_chat_format, tokenise_pairs
from harness.study.errors import UsageError


def data_spec(config: RunConfig) -> DataSpec:
    """Return where the pairs are: what the config says, or the embedded study's own files."""
    data = config.data
    keys = {name: getattr(data, name) for name in DataSpec.__dataclass_fields__}
    if config.model.path == EMBEDDED and not any(keys[name] for name in ("path", "train", "dev", "golden")):
        folder = checkpoint_dir(config.model)
        keys |= {split: str(folder / f"{split}.jsonl") for split in ("train", "dev", "golden")}
    return DataSpec(**keys)


@lru_cache(maxsize=4)
def _splits(spec: DataSpec) -> Splits:
    return load_splits(spec)


def splits_of(config: RunConfig) -> Splits:
    """Load the splits of a config; needs no torch."""
    splits = _splits(data_spec(config))
    if config.model.path != EMBEDDED:
        return splits
    folder = str(checkpoint_dir(config.model))  # where this machine keeps the package says nothing to a reader
    facts = {
        key: value | {"path": value["path"].replace(folder + os.sep, f"{EMBEDDED}:")} if "path" in value else value
        for key, value in splits.facts.items()
        if isinstance(value, dict)
    }
    return replace(splits, facts=splits.facts | facts)


def prompt_rows(splits: Splits) -> list[dict[str, Any]]:
    """Return the rows of prompts.jsonl: what scorers need to know of each evaluation prompt."""
    rows = []
    for split, prompts, pairs in (
        ("dev", splits.dev_prompts, splits.dev_pairs),
        ("golden", splits.golden_prompts, splits.golden_pairs),
    ):
        counts: dict[str, int] = {}
        for pair in pairs:
            counts[pair.prompt_id] = counts.get(pair.prompt_id, 0) + 1
        rows += [prompt_row(split, prompt, counts.get(prompt.prompt_id, 0)) for prompt in prompts]
    return rows


def prompt_row(split: str, prompt: EvalPrompt, num_pairs: int) -> dict[str, Any]:
    """Return one row of prompts.jsonl."""
    return {
        "split": split,
        "prompt_id": prompt.prompt_id,
        "prompt": [dict(message) for message in prompt.prompt],
        "checks": list(prompt.checks),
        "cluster": prompt.cluster or "",
        "pairs": num_pairs,
        "about": prompt.about,
        "follows": prompt.follows,
    }


@dataclass(frozen=True)
class Tokens:
    """Token ids of all splits, and the format that made them."""

    chat: ChatFormat
    train: TokenisedPairs
    dev: TokenisedPairs
    golden: TokenisedPairs


@lru_cache(maxsize=2)
def _tokens(spec: DataSpec, folder: Path, template: str | None, auto: bool, max_length: int) -> Tokens:
    chat = load_chat_format(folder, revision=None, template=template, auto=auto)
    splits = _splits(spec)
    train, dev, golden = (
        tokenise_pairs(pairs, chat, max_length=max_length)
        for pairs in (splits.train, splits.dev_pairs, splits.golden_pairs)
    )
    if not train.rows:
        reasons = "; ".join(f"{reason} ({count} pairs)" for reason, count in train.dropped.items())
        raise UsageError(f"data.train: no training pair is left after tokenisation: {reasons}")
    for prompt in [*splits.dev_prompts, *splits.golden_prompts]:
        chat.prompt_ids(
            prompt.conversation("Yes."), conversational=prompt.conversational
        )  # a template may refuse one: say so now
    return Tokens(chat, train, dev, golden)


def tokens_of(config: RunConfig) -> Tokens:
    """Tokenise the splits of a config, once in a process."""
    return _tokens(
        data_spec(config),
        checkpoint_dir(config.model),
        config.model.chat_template,
        config.data.template is Template.auto,
        config.data.max_length,
    )


def num_steps(config: RunConfig, num_pairs: int) -> int:
    """Return how many optimiser steps a config takes over so many pairs."""
    assert config.train.epochs is not None, "the profile fills it, and the batch size"
    assert config.train.batch_size is not None
    return -(-num_pairs * config.train.epochs // config.train.batch_size)


def problems(config: RunConfig) -> Iterator[str]:
    """Yield what is wrong with the section `data`: files that are missing for a study, shares that leave nothing."""
    data = config.data
    given = [name for name in ("path", "train", "dev", "golden") if getattr(data, name) is not None]
    if config.model.path != EMBEDDED and not given:
        yield (
            f"model.path={config.model.path}: your own model needs your own pairs; set data.train, data.dev and "
            "data.golden, or data.path for one file that is split by prompt"
        )
    if data.path is None and given and "train" not in given:
        yield f"data.train=null: data.{given[0]} is given without pairs to train on; set data.train or data.path"
    if data.path is None and "train" in given and "golden" not in given:
        yield "data.golden=null: nothing to decide on; set data.golden, or data.path for one file that is split"
    if data.dev_fraction + data.golden_fraction >= 1:
        yield f"data.golden_fraction={data.golden_fraction:g}: dev and golden together leave nothing to train on"
