"""Config -> the inputs that all trials of a study share: splits, token ids, hashes; and rows of prompts.jsonl."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from harness.config.checkpoint import Checkpoints
from harness.config.schema import EMBEDDED, DataConfig, ModelConfig, RunConfig, Template
from harness.config.trial_id import plain
from harness.data.reasoning import DROP, without_reasoning
from harness.data.records import EvalPrompt, Pair
from harness.data.splits import SplitFacts, Splits, load_splits
from harness.data.tokens import ChatFormat, TokenisedPairs, load_chat_format, tokenise_pairs
from harness.study.errors import UsageError
from harness.study.files import digest
from harness.study.rows import PromptRow

_KEPT = 4  # splits, and token ids, of the data sets used last: the studies of a family take turns
T = TypeVar("T")


@dataclass(frozen=True)
class Tokens:
    """Token ids of all splits, and the format that made them."""

    chat: ChatFormat
    train: TokenisedPairs
    dev: TokenisedPairs
    golden: TokenisedPairs


class Inputs:
    """Loads splits and token ids, each once per data set; needs no torch.

    Attributes:
        checkpoints: folders and hashes of the checkpoints.
    """

    def __init__(self, checkpoints: Checkpoints | None = None) -> None:
        self.checkpoints = checkpoints or Checkpoints()
        self._splits: dict[str, Splits] = {}
        self._tokens: dict[str, Tokens] = {}

    def splits(self, config: RunConfig) -> Splits:
        """Return the splits of a config.

        Raises:
            UsageError: see `load_splits`.
        """
        is_embedded = config.model.path == EMBEDDED
        # Neither changes the splits, and a family may vary them.
        data = replace(self._data_of(config), max_length=DataConfig.max_length, template=Template.auto)
        key = digest([plain(data), is_embedded])
        if key not in self._splits:
            splits = load_splits(data)
            _keep(self._splits, key, self._without_folder(splits) if is_embedded else splits)
        return self._splits[key]

    def tokens(self, config: RunConfig) -> Tokens:
        """Return the token ids of a config's splits.

        Raises:
            UsageError: where no training pair is left, or the chat template refuses a prompt.
        """
        key = digest([plain(self._data_of(config)), plain(config.model), config.generate.reasoning == DROP])
        if key not in self._tokens:
            chat = load_chat_format(
                self.checkpoints.folder(config.model, config.results_dir),
                revision=None,
                template=config.model.chat_template,
                auto=config.data.template is Template.auto,
            )
            _keep(self._tokens, key, _tokenise(self.splits(config), chat, config))
        return self._tokens[key]

    def contents(self, config: RunConfig) -> dict[str, str]:
        """Return the SHA-256 by name of all files that a config only names: part of a trial id."""
        return self.checkpoints.contents(config, self.splits(config).facts)

    def _data_of(self, config: RunConfig) -> DataConfig:
        """Return the data settings, with the embedded study's files where the config names none."""
        data = config.data
        if config.model.path != EMBEDDED or any((data.path, data.train, data.dev, data.golden)):
            return data
        train, dev, golden = (str(self._embedded_folder / f"{split}.jsonl") for split in ("train", "dev", "golden"))
        return replace(data, train=train, dev=dev, golden=golden)

    @property
    def _embedded_folder(self) -> Path:
        return self.checkpoints.folder(ModelConfig())

    def _without_folder(self, splits: Splits) -> Splits:
        """Take the folder of the embedded study out of the recorded paths: it differs between machines."""

        def renamed(facts: SplitFacts) -> SplitFacts:
            return {**facts, "path": facts["path"].replace(f"{self._embedded_folder}{os.sep}", f"{EMBEDDED}:")}

        facts = splits.facts.copy()
        facts["train"], facts["dev"], facts["golden"] = map(renamed, (facts["train"], facts["dev"], facts["golden"]))
        return replace(splits, facts=facts)


def _keep(kept: dict[str, T], key: str, value: T) -> None:
    """Add an entry; the oldest goes where there are too many."""
    kept[key] = value
    if len(kept) > _KEPT:
        del kept[next(iter(kept))]


def _tokenise(splits: Splits, chat: ChatFormat, config: RunConfig) -> Tokens:
    train, dev, golden = (
        _tokenise_split(pairs, chat, config) for pairs in (splits.train, splits.dev_pairs, splits.golden_pairs)
    )
    if not train.rows:
        reasons = "; ".join(f"{reason} ({count} pairs)" for reason, count in train.dropped.items())
        raise UsageError(f"data.train: no training pair is left after tokenisation: {reasons}")
    for prompt in [*splits.dev_prompts, *splits.golden_prompts]:
        # A template may refuse one: say so before anything is trained.
        chat.prompt_ids(prompt.conversation("Yes."), conversational=prompt.conversational)
    return Tokens(chat, train, dev, golden)


def _tokenise_split(pairs: tuple[Pair, ...], chat: ChatFormat, config: RunConfig) -> TokenisedPairs:
    """Tokenise the pairs of a split, without the thinking in their answers where `generate.reasoning=drop`."""
    if config.generate.reasoning != DROP:
        return tokenise_pairs(pairs, chat, max_length=config.data.max_length)
    kept, alike = without_reasoning(pairs)
    found = tokenise_pairs(kept, chat, max_length=config.data.max_length)
    return replace(found, dropped=found.dropped | alike)


def prompt_rows(splits: Splits) -> list[PromptRow]:
    """Return the rows of prompts.jsonl: each evaluation prompt, for scorers."""
    rows: list[PromptRow] = []
    for split, prompts, pairs in (
        ("dev", splits.dev_prompts, splits.dev_pairs),
        ("golden", splits.golden_prompts, splits.golden_pairs),
    ):
        counts: dict[str, int] = {}
        for pair in pairs:
            counts[pair.prompt_id] = counts.get(pair.prompt_id, 0) + 1
        rows += [prompt_row(split, prompt, counts.get(prompt.prompt_id, 0)) for prompt in prompts]
    return rows


def prompt_row(split: str, prompt: EvalPrompt, num_pairs: int) -> PromptRow:
    """Return one row of prompts.jsonl."""
    return {
        "split": split,
        "prompt_id": prompt.prompt_id,
        "prompt": list(prompt.prompt),
        "checks": list(prompt.checks),
        "cluster": prompt.cluster or "",
        "pairs": num_pairs,
        "about": prompt.about,
        "follows": prompt.follows,
    }


def num_steps(config: RunConfig, num_pairs: int) -> int:
    """Return the number of optimiser steps that a config takes over `num_pairs` pairs."""
    assert config.train.epochs is not None, "the defaults fill it, and the batch size"
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
