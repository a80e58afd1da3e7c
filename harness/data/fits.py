"""What a checkpoint's tables hold (rows of the embedding, positions), and whether token ids and lengths fit in.

Reads config.json and the headers of the safetensors files, and loads no weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.config.checkpoint_files import header, read_json_object, weight_files
from harness.study.errors import UsageError
from harness.study.manifest import Finding

if TYPE_CHECKING:
    from harness.data.tokens import ChatFormat

_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings?|embed_in|tok_embeddings|tokens_embed)\.weight$")
_POSITIONS = re.compile(r"(^|\.)(wpe|(embed_)?positions?(_embed(ding)?s?)?|pos_embed\w*)\.weight$")
_OTHER_TOWERS = re.compile(r"vision|visual|image|audio|speech")
# Types whose table of positions is computed and not stored, with the key of its size.
_COMPUTED = {"gptj": "n_positions", "codegen": "n_positions", "ctrl": "n_positions", "mpt": "max_seq_len"}
_LIMITS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length")
_SHOWN_TOKENS = 5  # tokens that a message names; the rest is counted


@dataclass(frozen=True)
class Tables:
    """The sizes of a checkpoint's tables.

    Attributes:
        rows: of the embedding, one per token; None where it is not known.
        positions: tokens that a sequence may have; None for any number.
        absolute: whether a longer sequence is impossible, and not only beyond what the model was trained on.
    """

    rows: int | None
    positions: int | None
    absolute: bool


def read_tables(folder: Path) -> Tables:
    """Read the sizes of a checkpoint's tables."""
    config = _text_config(read_json_object(folder / "config.json") or {})
    shapes = dict(_shapes(folder))
    rows = [shape[0] for name, shape in shapes.items() if _EMBEDDING.search(name)]
    if isinstance(config.get("vocab_size"), int) and not rows:
        rows = [config["vocab_size"]]
    stored = [shape[0] for name, shape in shapes.items() if _POSITIONS.search(name)]
    declared = [int(config[key]) for key in _LIMITS if isinstance(config.get(key), int) and config[key] > 0]
    computed = config.get(_COMPUTED.get(str(config.get("model_type")), ""))
    if stored:
        # A table may have rows more than positions: OPT's first two are never a token's.
        return Tables(min(rows, default=None), min([*stored, *declared[:1]]) - _shift(config, stored), True)
    if isinstance(computed, int):
        return Tables(min(rows, default=None), computed, True)
    has_no_positions = config.get("alibi") or (config.get("attn_config") or {}).get("alibi")
    return Tables(min(rows, default=None), None if has_no_positions else next(iter(declared), None), False)


def _shift(config: dict[str, Any], stored: Sequence[int]) -> int:
    """Return how many positions RoBERTa and its kin leave out: they count from the padding's id on."""
    counts_padding = "roberta" in str(config.get("model_type")) or config.get("model_type") in (
        "camembert",
        "data2vec-text",
    )
    return int(config.get("pad_token_id") or 0) + 1 if counts_padding else 0


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a config that describes the language model."""
    for key in ("text_config", "language_config", "llm_config"):
        if isinstance(config.get(key), dict):
            return {**config, **config[key]}
    return config


def _shapes(folder: Path) -> Iterator[tuple[str, Sequence[int]]]:
    for path in weight_files(folder):
        for name, about in (header(path) or {}).items():
            if len(about["shape"]) == 2 and not _OTHER_TOWERS.search(name):
                yield name, about["shape"]


def check_ids(
    tables: Tables, chat: ChatFormat, ids: Iterable[Sequence[int]], *, encodes_answers: bool
) -> Iterator[Finding]:
    """Prove that each id has a row in the embedding.

    Args:
        tables: of the checkpoint.
        chat: its tokenizer, with the ids at which generation stops.
        ids: all ids of pairs and prompts.
        encodes_answers: whether answers will become part of prompts, so that any token of the tokenizer may occur.

    Raises:
        UsageError: names the tokens without a row.
    """
    tokenizer, rows = chat.tokenizer, tables.rows
    if rows is None:
        return
    size = max([len(tokenizer), *(token + 1 for token in tokenizer.added_tokens_decoder)])
    used = {token for row in ids if row and max(row) >= rows for token in row if token >= rows}
    used |= {token for token in chat.stop_ids if token >= rows and token == chat.end.token}
    if encodes_answers:
        used |= set(range(rows, size))
    how_to_mend = (
        "save the checkpoint again after model.resize_token_embeddings(len(tokenizer)), or give the tokenizer that the "
        "model was trained with"
    )
    if used:
        raise UsageError(
            f"tokens without a row in the embedding: the tokenizer has {size} tokens and the embedding {rows} rows; "
            f"the data use {_few(chat, sorted(used))}; {how_to_mend}"
        )
    if size > rows:
        unused = _few(chat, range(rows, size))
        detail = f"the tokenizer has {size} tokens and the embedding {rows} rows; the data do not use {unused}"
        yield Finding("embedding", "warned", f"{detail}; {how_to_mend}")
    else:
        yield Finding("embedding", "proved", f"each of the tokenizer's {size} tokens has one of {rows} rows")


def _few(chat: ChatFormat, ids: Sequence[int]) -> str:
    more = f" and {len(ids) - _SHOWN_TOKENS} more" if len(ids) > _SHOWN_TOKENS else ""
    return chat.named(ids[:_SHOWN_TOKENS]) + more


@dataclass(frozen=True)
class Lengths:
    """Numbers of tokens in a study: of the longest pair, and of the longest prompts of both kinds.

    Attributes:
        pair: prompt and longer answer.
        prompt: the longest prompt that follows no answer.
        follow_up: the longest prompt that follows an answer, without that answer; 0 where there is none.
    """

    pair: int
    prompt: int
    follow_up: int


def check_lengths(tables: Tables, lengths: Lengths, *, max_length: int, new_tokens: int) -> Iterator[Finding]:
    """Prove that pairs, and prompts with their answers, fit the model's positions.

    Raises:
        UsageError: for a longer sequence than the model has positions.
    """
    limit = tables.positions
    if limit is None:
        return
    answered = max(lengths.prompt + new_tokens, lengths.follow_up + 2 * new_tokens if lengths.follow_up else 0)
    problems = []
    if answered > limit:
        shorter = limit - (answered - new_tokens)
        way_out = f"at most {shorter}, or leave" if shorter > 0 and not lengths.follow_up else "fewer, or leave"
        problems.append(
            f"generate.max_new_tokens={new_tokens}: the longest prompt has {answered - new_tokens} tokens, together "
            f"{answered}, and the model has {limit} positions; give {way_out} long prompts out"
        )
    if lengths.pair > limit:
        problems.append(
            f"data.max_length={max_length}: the longest pair has {lengths.pair} tokens, and the model has {limit} "
            f"positions; give data.max_length={limit}, which drops longer pairs"
        )
    if problems and tables.absolute:
        raise UsageError("\n".join(problems))
    for problem in problems:
        yield Finding("positions", "warned", f"{problem} (beyond them its answers get worse)")
    if not problems:
        longest = max(answered, lengths.pair)
        yield Finding(
            "positions", "proved", f"no sequence has more than {longest} tokens; the model has {limit} positions"
        )
