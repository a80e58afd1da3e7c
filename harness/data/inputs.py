"""Config -> the inputs that all trials of a study share: splits, token ids, hashes; and rows of prompts.jsonl."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from harness.config.checkpoint import Checkpoints
from harness.config.schema import EMBEDDED, DataConfig, ModelConfig, RunConfig, Template
from harness.config.trial_id import plain
from harness.data.cache import KEPT_FROM, DataCache, Kept, LatePairs
from harness.data.fits import Lengths, Tables, check_ids, check_lengths, read_tables
from harness.data.reasoning import DROP, without_reasoning
from harness.data.records import EvalPrompt, Given, Message, Pair
from harness.data.splits import SplitFacts, Splits, load_splits
from harness.data.template import takes, unread_keys
from harness.data.token_rows import TokenisedPairs, as_rows, pair_lengths
from harness.data.tokens import CHANGED, TWICE, ChatFormat, load_chat_format, tokenise_pairs
from harness.data.written import NOT_ASKED, Readback
from harness.study.errors import UsageError
from harness.study.files import digest, file_sha256
from harness.study.manifest import Finding
from harness.study.registration import registered_date
from harness.study.rows import PromptRow

_TRIED = 8  # conversations on which the chat template is proved, the first ones of the training pairs
_KEPT = 4  # splits, and token ids, of the data sets used last: the studies of a family take turns
T = TypeVar("T")


@dataclass(frozen=True)
class Tokens:
    """Token ids of all splits, and the format that made them.

    Attributes:
        chat: the format.
        train, dev, golden: pairs by split.
        lengths, tables: of the longest sequences, and what the checkpoint has room for.
        findings: what was proved on the ids and the chat template.
    """

    chat: ChatFormat
    train: TokenisedPairs
    dev: TokenisedPairs
    golden: TokenisedPairs
    lengths: Lengths
    tables: Tables
    findings: tuple[Finding, ...] = ()

    @property
    def by_split(self) -> dict[str, TokenisedPairs]:
        """The pairs of each split."""
        return {"train": self.train, "dev": self.dev, "golden": self.golden}

    @property
    def facts(self) -> Kept:
        """What is kept beside the ids, as JSON values."""
        return {"lengths": asdict(self.lengths), "findings": [asdict(finding) for finding in self.findings]}

    @classmethod
    def of_kept(cls, chat: ChatFormat, tables: Tables, pairs: Mapping[str, TokenisedPairs], facts: Kept) -> Tokens:
        """Return tokens that were kept as `by_split` and `facts`."""
        findings = tuple(Finding(**finding) for finding in facts["findings"])
        return cls(chat, **pairs, lengths=Lengths(**facts["lengths"]), tables=tables, findings=findings)

    @property
    def warnings(self) -> list[str]:
        """What the reader of a study should know of its tokens, one sentence each."""
        return [finding.detail for finding in self.findings if finding.result == "warned"]


class Inputs:
    """Loads splits and token ids, each once per data set; needs no torch.

    Attributes:
        checkpoints: folders and hashes of the checkpoints.
        date: of the studies that are registered with these inputs, in ISO form (UTC): what chat templates take for now.
    """

    def __init__(self, checkpoints: Checkpoints | None = None) -> None:
        self.checkpoints = checkpoints or Checkpoints()
        self.date = datetime.now(UTC).isoformat(timespec="seconds")
        self._splits: dict[str, Splits] = {}
        self._tokens: dict[str, Tokens] = {}

    def splits(self, config: RunConfig) -> Splits:
        """Return the splits of a config.

        Raises:
            UsageError: see `load_splits`.
        """
        key, data = self._split_settings(config)
        if key not in self._splits:
            splits = DataCache(config.results_dir).splits(data, lambda: load_splits(data))
            is_embedded = config.model.path == EMBEDDED
            _keep(self._splits, key, self._without_folder(splits) if is_embedded else splits)
        return self._splits[key]

    def tokens(self, config: RunConfig) -> Tokens:
        """Return the token ids of a config's splits.

        Raises:
            UsageError: where no training pair is left, the chat template refuses a prompt or cannot be relied on, or
                the checkpoint has no room for a token or a length.
        """
        key = digest([plain(self._data_of(config)), plain(config.model), config.generate.reasoning == DROP])
        found = self._tokens.get(key)
        if found is None:
            date = registered_date(config.study_folder, otherwise=self.date)
            dated = digest([key, date.isoformat()])
            found = self._tokens.get(dated)
        if found is None:
            folder = self.checkpoints.folder(config.model, config.results_dir)
            chat = load_chat_format(
                folder,
                revision=None,
                template=config.model.chat_template,
                auto=config.data.template is Template.auto,
                date=date,
            )
            found = self._kept_or_tokenised(config, chat, read_tables(folder), folder, date)
            _keep(self._tokens, dated if chat.reads_clock else key, found)
        new_tokens = config.generate.max_new_tokens or 0
        fitting = check_lengths(found.tables, found.lengths, max_length=config.data.max_length, new_tokens=new_tokens)
        return replace(found, findings=(*found.findings, *fitting))

    def _kept_or_tokenised(
        self, config: RunConfig, chat: ChatFormat, tables: Tables, folder: Path, date: datetime
    ) -> Tokens:
        """Return the token ids from the results folder's cache where the data are large, else tokenise them."""
        splits = self.splits(config)
        _fit_padding(chat, tables)
        if len(splits.train) < KEPT_FROM:
            return _tokenise(splits, chat, config, tables)
        about = [
            plain(self._data_of(config)),
            self.checkpoints.tokenizer_sha256(folder),
            *([file_sha256(Path(config.model.chat_template))] if config.model.chat_template else []),
            [splits.facts[name]["sha256"] for name in ("train", "dev", "golden")],
            config.generate.reasoning == DROP,
            date.isoformat() if chat.reads_clock else None,
            asdict(tables),
        ]
        cache = DataCache(config.results_dir)
        if (kept := cache.tokens(about)) is None:
            found = _tokenise(splits, chat, config, tables)
            cache.keep_tokens(about, found.by_split, found.facts)
            self._forget_texts(config)
            if (kept := cache.tokens(about)) is None:  # it could not be written
                return found
        return Tokens.of_kept(chat, tables, *kept)

    def _split_settings(self, config: RunConfig) -> tuple[str, DataConfig]:
        """Return the settings that make the splits, with their key.

        Two others do not change the splits, and a family may vary them.
        """
        data = replace(self._data_of(config), max_length=DataConfig.max_length, template=Template.auto)
        return digest([plain(data), config.model.path == EMBEDDED]), data

    def _forget_texts(self, config: RunConfig) -> None:
        """Drop the texts of tokenised training pairs: those of 60,000 pairs take half a gigabyte."""
        key, data = self._split_settings(config)
        splits = self._splits[key]
        late = LatePairs(len(splits.train), lambda: load_splits(data).train)
        self._splits[key] = replace(splits, train=late)

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


def _fit_padding(chat: ChatFormat, tables: Tables) -> None:
    """Pad with a token that has a row in the embedding: padding is masked, and yet looked up."""
    tokenizer = chat.tokenizer
    if tables.rows is not None and tokenizer.pad_token_id >= tables.rows:
        tokenizer.pad_token = tokenizer.eos_token


def _tokenise(splits: Splits, chat: ChatFormat, config: RunConfig, tables: Tables) -> Tokens:
    findings = _check_template(splits, chat)
    train, dev, golden = (
        _tokenise_split(pairs, chat, config) for pairs in (splits.train, splits.dev_pairs, splits.golden_pairs)
    )
    if not train.rows:
        reasons = "; ".join(f"{reason} ({count} pairs)" for reason, count in train.dropped.items())
        raise UsageError(f"data.train: no training pair is left after tokenisation: {reasons}")
    prompts = [*splits.dev_prompts, *splits.golden_prompts]
    # A template may refuse one: say so before anything is trained.
    asked = [
        chat.prompt_ids(prompt.conversation("Yes."), conversational=prompt.conversational, given=prompt.given)
        for prompt in prompts
    ]
    follow_ups = [len(ids) for ids, prompt in zip(asked, prompts, strict=True) if prompt.follows is not None]
    parts = [as_rows(pairs.rows) for pairs in (train, dev, golden)]
    lengths = Lengths(
        pair=max(int(pair_lengths(rows).max(initial=0)) for rows in parts),
        prompt=max((len(ids) for ids, prompt in zip(asked, prompts, strict=True) if prompt.follows is None), default=0),
        follow_up=max(follow_ups, default=0),
    )
    findings += _pair_findings({"train": train, "dev": dev, "golden": golden})
    findings += _prompt_findings(splits, asked, chat)
    ids: list[Sequence[int]] = [*asked, *(rows.distinct_ids for rows in parts)]
    findings += check_ids(tables, chat, ids, encodes_answers=bool(follow_ups))
    return Tokens(chat, train, dev, golden, lengths, tables, tuple(findings))


def _pair_findings(splits: Mapping[str, TokenisedPairs]) -> Iterator[Finding]:
    """Say what was proved of each pair, and how many pairs the template does not leave as they are."""
    kept = sum(len(pairs.rows) for pairs in splits.values())
    yield Finding(
        "token ids",
        "proved",
        f"in {kept} pairs the ids of prompt and answer, joined, are the text that the chat template or the data give; "
        "the answer stands in it unchanged and ends its turn once",
    )
    for split, pairs in splits.items():
        total = len(pairs.rows) + sum(pairs.dropped.values())
        for name, reason in (("answers", CHANGED), ("single answers", TWICE), ("prompts", NOT_ASKED)):
            if count := pairs.dropped.get(reason, 0):
                yield Finding(
                    f"{name} of {split}", "warned", f"{split}: {count} of {total} pairs are dropped: {reason}"
                )
        if pairs.readback is not None:
            yield from pairs.readback.findings(split)


def _prompt_findings(splits: Splits, asked: Sequence[Sequence[int]], chat: ChatFormat) -> Iterator[Finding]:
    """Say what of the evaluation prompts does not stand in their token ids, in splits where not all have pairs."""
    ids = iter(asked)
    for split, prompts, pairs in (
        ("dev", splits.dev_prompts, splits.dev_pairs),
        ("golden", splits.golden_prompts, splits.golden_pairs),
    ):
        readback = Readback(chat.tokenizer, chat.stop_ids)
        with_pairs = {pair.prompt_id for pair in pairs}
        for prompt in prompts:
            own = next(ids)
            if prompt.follows is None:
                chat.look_at(prompt, (own,), readback)
        if any(prompt.prompt_id not in with_pairs for prompt in prompts):
            yield from readback.findings(f"prompts of {split}")


def _check_template(splits: Splits, chat: ChatFormat) -> list[Finding]:
    """Prove what the chat template does with a study's conversations; see `ChatFormat.findings`.

    Raises:
        UsageError: for a template with chance in it, or one that does not take what the rows give it.
    """
    pairs = [*splits.train, *splits.dev_pairs, *splits.golden_pairs]
    prompts = [*splits.dev_prompts, *splits.golden_prompts]
    both: list[Pair | EvalPrompt] = [*pairs, *prompts]
    rows = [(row.prompt, row.given) for row in both if chat.templated(row.conversational)]
    if not rows:
        return []
    findings = list(chat.findings(rows[:_TRIED]))
    given = Counter(name for _, gives in rows for name in gives.names)
    for name, count in given.items():
        if not takes(chat.template, name, [(turns, gives) for turns, gives in rows if name in gives.names]):
            column = name if name == "tools" else f"chat_template_kwargs.{name}"
            raise UsageError(
                f"`{column}`: {count} rows of the data have it, and the chat template does not take it, so that the "
                "model would not see it; take it out of the data, or give a template that takes it with "
                "model.chat_template"
            )
    turns: list[tuple[Sequence[Message], Given, int]] = [(prompt.prompt, prompt.given, 0) for prompt in prompts]
    for pair in pairs:
        turns += [((*pair.prompt, *pair.chosen), pair.given, 0)]
        turns += [((*pair.prompt, *pair.rejected), pair.given, len(pair.prompt))]
    unread = unread_keys(chat.template, turns)
    if unread:
        shown = ", ".join(f"`{key}` ({count} turns)" for key, count in unread.items())
        findings.append(
            Finding("keys of turns", "warned", f"the chat template does not write these keys of turns: {shown}")
        )
    return findings


def _tokenise_split(pairs: Sequence[Pair], chat: ChatFormat, config: RunConfig) -> TokenisedPairs:
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
