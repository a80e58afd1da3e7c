"""What of a study's texts stands in its token ids: turns that a chat template leaves out, text that a tokenizer loses.

Texts are compared without white space, in Unicode's normal form NFC.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from harness.data.reasoning import part
from harness.data.records import Message
from harness.data.unicode import normal
from harness.study.errors import UsageError
from harness.study.manifest import Finding
from harness.study.text import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ASKED, SYSTEM, EARLIER = "the user's turn", "the system turn", "an earlier turn"
_WAY_OUT = "give a template that writes it with model.chat_template"
# Why pairs are dropped whose prompt is not what the models would see.
NOT_ASKED = f"the chat template leaves out or rewrites {ASKED}; {_WAY_OUT}"


def squeezed(text: str) -> str:
    """Return a text in NFC without white space."""
    return "".join(normal(text).split())


def _holds(text: str, said: str) -> bool:
    """Return whether a text holds another one, but for white space; most do to the letter, which is seen at once."""
    return said.strip() in text or squeezed(said) in squeezed(text)


def left_out(turns: Sequence[Message], text: str) -> dict[str, str]:
    """Return the turns of a prompt that do not stand in its rendering: what they are, and their text.

    Earlier answers may be written without their thinking.
    """
    last = len(turns) - 1
    found: dict[str, str] = {}
    for i, turn in enumerate(turns):
        said = turn["content"]
        if _holds(text, said):
            continue
        if i < last and turn["role"] == "assistant" and _holds(text, part(said).answer):
            continue
        kind = ASKED if i == last else SYSTEM if turn["role"] in ("system", "developer") else EARLIER
        found.setdefault(kind, said)
    return found


class Readback:
    """Counts, over rows of a split, what does not read back from their token ids.

    Args:
        tokenizer: a transformers tokenizer.
        stop_ids: ids at which generation stops; many a tokenizer names one of them for unknown text, too.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        others = {tokenizer.bos_token_id, tokenizer.eos_token_id, *stop_ids}
        self._unknown = None if tokenizer.unk_token_id in others else tokenizer.unk_token_id
        self._rows = 0
        self._lost: dict[str, tuple[int, str]] = {}  # what is lost -> number of rows, first example

    def look(self, texts: Sequence[tuple[str, Sequence[int]]], missing: dict[str, str]) -> None:
        """Count one row.

        Args:
            texts: each with the token ids that it stands in.
            missing: turns that its rendering leaves out; see `left_out`.
        """
        self._rows += 1
        found = dict(missing)
        for text, ids in texts:
            kind = self._lost_in(text, ids)
            if kind is not None and kind not in found:
                found[kind] = self._lost[kind][1] if kind in self._lost else self._example(text, ids)
        for kind, example in found.items():
            count, first = self._lost.get(kind, (0, example))
            self._lost[kind] = (count + 1, first)

    def findings(self, split: str) -> Iterator[Finding]:
        """Yield a warning for each kind of loss.

        Raises:
            UsageError: where every row holds unknown text, or lacks the user's turn.
        """
        for kind, (count, example) in self._lost.items():
            rows, shown = f"{count} of {self._rows} rows", one_line(example, 60)
            if kind == _UNKNOWN:
                name = self._tokenizer.convert_ids_to_tokens(self._unknown)
                said = f"{split}: in {rows} the tokenizer writes text as {name} (id {self._unknown}), as {shown!r}"
                way_out = "give the tokenizer that the model was trained with, or take such rows out of the data"
            elif kind in (ASKED, SYSTEM, EARLIER):
                said = f"{split}: in {rows} the chat template leaves out or rewrites {kind}, as {shown!r}"
                way_out = f"the models do not see it; {_WAY_OUT}"
            else:
                said = f"{split}: {rows} do not read back from their token ids as they are: {kind}, as in {shown!r}"
                way_out = "answers are trained on, and read by scorers, as the tokenizer writes them"
            if count == self._rows and kind in (_UNKNOWN, ASKED):
                raise UsageError(f"{said}; {way_out}")
            yield Finding(f"{kind} in {split}", "warned", f"{said}; {way_out}")

    def _lost_in(self, text: str, ids: Sequence[int]) -> str | None:
        """Return what of a text its token ids do not hold; None where they hold it."""
        if self._unknown is not None and self._unknown in ids and str(self._tokenizer.unk_token) not in text:
            return _UNKNOWN
        read = self._read(ids)
        if _holds(read, text):
            return None
        return _CASE if _holds(read.lower(), text.lower()) else _CHARACTERS

    def _example(self, text: str, ids: Sequence[int]) -> str:
        """Return a word of a text that its token ids do not hold."""
        for token in self._tokenizer.added_tokens_encoder:
            text = text.replace(token, " ")
        read = squeezed(self._read(ids))
        return next((word for word in text.split() if squeezed(word) not in read), text.strip())

    def _read(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


_UNKNOWN = "unknown text"
_CASE = "the tokenizer changes capital and small letters"
_CHARACTERS = "the tokenizer drops or changes characters"
