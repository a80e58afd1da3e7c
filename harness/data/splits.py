"""Data settings (files, Hub data sets) -> three splits that share no golden prompt, with a record of their sources.

Everything wrong with the files is a `UsageError` that names files and rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, NotRequired, TypedDict, TypeVar

import numpy as np

from harness.config.schema import DataConfig
from harness.data.formats import ParsedRow
from harness.data.records import EvalPrompt, Message, Pair, meaning
from harness.data.table import Table, TableFacts, read_table, table_warnings
from harness.study.errors import UnreachableError, UsageError
from harness.study.files import Json, digest
from harness.study.text import one_line

SPLITS = ("train", "dev", "golden")
_KEYS = ("data.path", *(f"data.{split}" for split in SPLITS))
T = TypeVar("T")
_SHOWN_LEAKS = 10  # prompts that a message lists; the rest is counted


class SplitFacts(TableFacts):
    """The source of one split: facts of the whole file, and the numbers of pairs and prompts in the split."""

    pairs: int
    prompts: int


class LabelNoise(TypedDict):
    """Flipped training labels: the requested share, the seed, their number, and a hash of the flipped pairs."""

    share: float
    seed: int
    flipped: int
    flipped_sha256: str


class DataFacts(TypedDict):
    """What was loaded, for study.yaml; `unread_columns` by key of the file, with the number of rows that have them."""

    train: SplitFacts
    dev: SplitFacts
    golden: SplitFacts
    label_noise: LabelNoise
    warnings: list[str]
    unread_columns: NotRequired[dict[str, dict[str, int]]]


@dataclass(frozen=True)
class Splits:
    """The three splits, in the order of their files.

    Attributes:
        train: pairs, labels already flipped where there is label noise; in large sets they may be read when asked for.
        dev_prompts: see `evaluation_prompts`; `dev_pairs` may hold several pairs of it, or none. Likewise golden.
        facts: sources, label noise and warnings, for study.yaml.
    """

    train: Sequence[Pair]
    dev_prompts: tuple[EvalPrompt, ...]
    dev_pairs: tuple[Pair, ...]
    golden_prompts: tuple[EvalPrompt, ...]
    golden_pairs: tuple[Pair, ...]
    facts: DataFacts


def load_splits(data: DataConfig) -> Splits:
    """Load, check and split; then subsample and flip labels as configured.

    Raises:
        UsageError: for missing or unreadable files, an unknown form, too many bad rows, golden prompts that occur
            in train or dev, or a split without prompts.
    """
    origins = _origins(data)
    tables = _read_tables(data, [key for key in _KEYS if key in origins.values()])
    rows = _assign_rows(data, origins, tables)
    refuse_leaks(rows, {split: tables[key].source.path for split, key in origins.items()})
    train = _unique_ids(_fixed_subset(_pairs_of_rows(rows["train"]), data.max_train_pairs, pair_digest))
    noisy, noise = flip_labels(train, data.label_noise, seed=data.label_noise_seed)
    dev_prompts, dev_pairs = _evaluation_data(rows["dev"], data.max_dev_prompts)
    golden_prompts, golden_pairs = _evaluation_data(rows["golden"], data.max_golden_prompts)
    facts: DataFacts = {
        "train": {
            **tables[origins["train"]].facts,
            "pairs": len(train),
            "prompts": len({pair.prompt_id for pair in train}),
        },
        "dev": {**tables[origins["dev"]].facts, "pairs": len(dev_pairs), "prompts": len(dev_prompts)},
        "golden": {**tables[origins["golden"]].facts, "pairs": len(golden_pairs), "prompts": len(golden_prompts)},
        "label_noise": noise,
        "warnings": [
            *(warning for table in tables.values() for warning in table_warnings(table, revision=data.revision)),
            *_split_warnings(data, origins, rows),
            *_train_warnings(train),
            *_checks_warnings("dev", dev_prompts),
            *_checks_warnings("golden", golden_prompts),
        ],
    }
    unread = {key: table.unread for key, table in tables.items() if table.unread}
    if unread:
        facts["unread_columns"] = unread
    return Splits(noisy, dev_prompts, dev_pairs, golden_prompts, golden_pairs, facts)


def _origins(data: DataConfig) -> dict[str, str]:
    """Return the config key of each split's source."""
    missing = [split for split in SPLITS if getattr(data, split) is None]
    if data.path is not None and not missing:
        raise UsageError(
            f"data.path={data.path}: data.train, data.dev and data.golden are all given; remove one of the four"
        )
    if data.path is None and "train" in missing:
        raise UsageError(
            "data.train=null: no pairs to train on; set data.train, or data.path for one file that is split"
        )
    if data.path is None and "golden" in missing:
        raise UsageError(
            "data.golden=null: nothing to decide on; set data.golden, or data.path for one file that is split"
        )
    shared = "data.train" if data.path is None else "data.path"
    return {split: shared if split in missing else f"data.{split}" for split in SPLITS}


def _read_tables(data: DataConfig, keys: Sequence[str]) -> dict[str, Table]:
    """Read all files; a `UsageError` names the problems of all of them."""
    tables: dict[str, Table] = {}
    problems: list[UsageError] = []
    for key in keys:
        reference = getattr(data, key.removeprefix("data."))
        try:
            tables[key] = read_table(
                reference,
                key=key,
                revision=data.revision,
                max_bad_fraction=data.max_bad_fraction,
                both_turns=data.turns == "both",
                answer_check=data.answer_check,
            )
        except UsageError as error:
            problems.append(error)
    if problems:
        unreachable = all(isinstance(error, UnreachableError) for error in problems)
        raise (UnreachableError if unreachable else UsageError)("\n".join(map(str, problems)))
    if data.revision is not None and not any(table.source.from_hub for table in tables.values()):
        raise UsageError(f"data.revision={data.revision}: none of the data is from the Hub; remove data.revision")
    return tables


def _assign_rows(data: DataConfig, origins: dict[str, str], tables: dict[str, Table]) -> dict[str, list[ParsedRow]]:
    """Return the rows of each split: all rows of its file, or its share by prompt where splits share a file."""
    rows: dict[str, list[ParsedRow]] = {split: [] for split in SPLITS}
    for key, table in tables.items():
        shares = _split_shares(data, [split for split in SPLITS if origins[split] == key])
        for row in table.rows:
            rows[assign_split(row.prompt_key, shares, data.split_seed)].append(row)
        empty = [split for split in shares if not rows[split]]
        if empty:
            given = ", ".join(f"{split} {share:.2g}" for split, share in shares.items())
            prompts = len({row.prompt_id for row in table.rows})
            raise UsageError(
                f"{key}={table.source.path}: split by prompt ({given}), its {prompts} prompts leave none for "
                f"{empty[0]}; set data.{empty[0]} to a file, give more prompts, or change data.dev_fraction, "
                "data.golden_fraction"
            )
    return rows


def _split_shares(data: DataConfig, splits: Sequence[str]) -> dict[str, float]:
    """Return the share of each split in its file; golden first, so that it does not depend on the share of dev."""
    shares = {"golden": data.golden_fraction, "dev": data.dev_fraction}
    shares = {split: share for split, share in shares.items() if split in splits}
    if "train" in splits:
        shares["train"] = 1 - sum(shares.values())
    return shares


def assign_split(key: str, shares: Mapping[str, float], seed: int) -> str:
    """Return the split of a prompt: a hash of its key and the seed, so that no other row and no order matters.

    Args:
        key: see `conversations.prompt_key`.
        shares: share of the prompts by split, in order; they are scaled to sum to one.
    """
    point = int(digest([seed, key])[:13], 16) / 16**13 * sum(shares.values())
    for split, share in shares.items():
        point -= share
        if point < 0:
            return split
    return split


def evaluation_prompts(rows: Iterable[ParsedRow]) -> list[EvalPrompt]:
    """Return the prompts, each with the checks and the cluster that any of its rows gives.

    Pairs of one prompt share it. A row without a pair asks its prompt again, as AlpacaEval asks a few instructions
    twice: that is a prompt of its own (`ID#1`, `ID#2`), in one cluster with the first.
    """
    rows = list(rows)
    times = Counter(row.prompt_id for row in rows if row.chosen is None)
    checks = {row.prompt_id: row.checks for row in reversed(rows) if row.checks}
    clusters = {name: name for name, count in times.items() if count > 1}
    clusters |= {row.prompt_id: row.cluster for row in reversed(rows) if row.cluster is not None}
    prompts: dict[str, EvalPrompt] = {}
    asked = Counter[str]()
    for row in rows:
        again = asked[row.prompt_id] if row.chosen is None else 0
        asked[row.prompt_id] += row.chosen is None
        name = f"{row.prompt_id}#{again}" if again else row.prompt_id
        found = replace(row.eval_prompt(), prompt_id=name, checks=checks.get(row.prompt_id, ()))
        prompts.setdefault(name, replace(found, cluster=clusters.get(row.prompt_id)))
    return list(prompts.values())


def _evaluation_data(rows: Sequence[ParsedRow], limit: int | None) -> tuple[tuple[EvalPrompt, ...], tuple[Pair, ...]]:
    """Return the prompts, and all pairs."""
    kept = _fixed_subset(evaluation_prompts(rows), limit, lambda prompt: prompt.follows or prompt.prompt_id)
    ids = {prompt.prompt_id for prompt in kept}
    kept = [prompt for prompt in kept if prompt.follows in (None, *ids)]  # no second turn without its first
    return tuple(kept), _unique_ids(_pairs_of_rows(row for row in rows if row.prompt_id in ids))


def _pairs_of_rows(rows: Iterable[ParsedRow]) -> list[Pair]:
    return [pair for row in rows if (pair := row.pair()) is not None]


def _fixed_subset(items: list[T], limit: int | None, key: Callable[[T], str]) -> list[T]:
    """Return `limit` items: those whose keys hash lowest, in their own order; a larger limit keeps a smaller one's."""
    if limit is None or len(items) <= limit:
        return items
    order = sorted(range(len(items)), key=lambda i: digest(["subset", key(items[i])]))
    return [items[i] for i in sorted(order[:limit])]


def _unique_ids(pairs: Sequence[Pair]) -> tuple[Pair, ...]:
    """Add the row to an id that an earlier pair has: files often repeat the prompt's id on each of its pairs."""
    seen: set[str] = set()
    unique = []
    for pair in pairs:
        unique.append(replace(pair, pair_id=f"{pair.pair_id}#{pair.row}") if pair.pair_id in seen else pair)
        seen.add(unique[-1].pair_id)
    return tuple(unique)


def pair_digest(pair: Pair) -> str:
    """Identify a pair by its content: prompt, chosen, rejected, and what the chat template gets beside them."""
    turns = [[_said(turn) for turn in said] for said in (pair.prompt, pair.chosen, pair.rejected)]
    return digest([*turns, *pair.given.plain])


def _said(turn: Message) -> dict[str, Json]:
    """Return a turn's role and content, and what else it says."""
    role, content, *more = meaning(turn)
    rest: Any = more[0] if more else {}
    return {"role": role, "content": content, **rest}


def flip_labels(pairs: Sequence[Pair], share: float, *, seed: int) -> tuple[tuple[Pair, ...], LabelNoise]:
    """Swap chosen and rejected of exactly `round(share * len(pairs))` pairs; return all pairs and a record.

    The flipped pairs depend on contents and seed, not on the order; a larger share also flips those of a smaller one.
    """
    count = round(share * len(pairs))
    digests = [pair_digest(pair) for pair in pairs] if count else []
    order = sorted(range(len(digests)), key=lambda i: digests[i])
    chosen = np.random.default_rng(seed).permutation(len(pairs))[:count]
    flipped = {order[i] for i in chosen}
    noisy = tuple(
        replace(pair, chosen=pair.rejected, rejected=pair.chosen) if i in flipped else pair
        for i, pair in enumerate(pairs)
    )
    flipped_sha256 = digest(sorted(digests[i] for i in flipped))
    return noisy, {"share": share, "seed": seed, "flipped": len(flipped), "flipped_sha256": flipped_sha256}


class Leak(NamedTuple):
    """A prompt that stands in two splits: the row in each, and whether it is the same to the character."""

    row: ParsedRow
    other: ParsedRow
    exact: bool


def find_leaks(rows: Iterable[ParsedRow], others: Iterable[ParsedRow]) -> list[Leak]:
    """Return one leak for each prompt of `rows` that occurs among `others`, an exact one where there is one."""
    by_id: dict[str, ParsedRow] = {}
    by_key: dict[str, ParsedRow] = {}
    for other in others:
        if other.prompt_id not in by_id:
            by_id[other.prompt_id] = other
            by_key.setdefault(other.prompt_key, other)
    leaks = {}
    for row in rows:
        same = by_id.get(row.prompt_id)
        alike = same or by_key.get(row.prompt_key)
        if row.prompt_id not in leaks and alike is not None:
            leaks[row.prompt_id] = Leak(row, alike, exact=same is not None)
    return list(leaks.values())


def refuse_leaks(rows: Mapping[str, Sequence[ParsedRow]], paths: Mapping[str, str]) -> None:
    """Raise a `UsageError` that names the golden prompts which occur in train or dev.

    Args:
        rows: by split.
        paths: of the file that each split comes from.
    """
    leaks = [(split, leak) for split in ("train", "dev") for leak in find_leaks(rows["golden"], rows[split])]
    if not leaks:
        return
    lines = "".join(
        f"\n  {paths['golden']}:{leak.row.row} = {paths[split]}:{leak.other.row} ({split}, "
        f"{'same text' if leak.exact else 'same after folding white space and case'}): "
        f"{one_line(leak.row.prompt[-1]['content'], 60)}"
        for split, leak in leaks[:_SHOWN_LEAKS]
    )
    number = len({leak.row.prompt_id for _, leak in leaks})
    raise UsageError(
        f"data.golden={paths['golden']}: {number} golden {'prompt occurs' if number == 1 else 'prompts occur'} in the "
        "data that models are trained or selected on; allowed: none. "
        f"The first {min(_SHOWN_LEAKS, len(leaks))}:{lines}\n"
        "Remove them from data.train and data.dev, or from data.golden; or give one file as data.path: it is split by "
        "prompt."
    )


def _split_warnings(data: DataConfig, origins: dict[str, str], rows: dict[str, list[ParsedRow]]) -> Iterator[str]:
    if data.path is None and origins["dev"] == "data.train":
        prompts = len({row.prompt_id for row in rows["dev"]})
        yield f"data.dev is not given: {prompts} prompts ({len(rows['dev'])} pairs) of data.train became dev"
    leaks = find_leaks(rows["dev"], rows["train"])
    if leaks:
        places = ", ".join(f"row {leak.row.row} = row {leak.other.row}" for leak in leaks[:_SHOWN_LEAKS])
        yield f"{len(leaks)} dev prompts occur in train: configs are selected on what they were trained on ({places})"
    for split in ("dev", "golden"):
        keys = {row.prompt_id: row.prompt_key for row in rows[split] if row.cluster is None}
        alike = len(keys) - len(set(keys.values()))
        if alike:
            yield f"{split}: {alike} prompts are others in different white space or case; give both the same `cluster`"


def _train_warnings(pairs: Sequence[Pair]) -> Iterator[str]:
    contents = [[_contents_of_turns(turns) for turns in (pair.prompt, pair.chosen, pair.rejected)] for pair in pairs]
    counts = Counter((prompt, chosen, rejected) for prompt, chosen, rejected in contents)
    repeated = sum(count - 1 for count in counts.values())
    if repeated:
        yield f"train: {repeated} of {len(pairs)} pairs repeat an earlier one (kept)"
    contradicting = sum((prompt, rejected, chosen) in counts for prompt, chosen, rejected in contents)
    if contradicting:
        yield f"train: {contradicting} of {len(pairs)} pairs contradict another: the same answers, exchanged (kept)"


def _contents_of_turns(turns: Sequence[Message]) -> tuple[str, ...]:
    return tuple(repr(meaning(turn)) for turn in turns)


def _checks_warnings(split: str, prompts: Sequence[EvalPrompt]) -> Iterator[str]:
    without = sum(not prompt.checks for prompt in prompts)
    if 0 < without < len(prompts):
        yield f"{split}: {without} of {len(prompts)} prompts have no checks and stay unscored by them"
