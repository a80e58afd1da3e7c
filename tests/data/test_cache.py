"""Large data are read and tokenised once: later processes get the same splits and token ids from the cache, or anew."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.config.schema import RunConfig
from harness.data.cache import KEPT_FROM, DataCache
from harness.data.inputs import Inputs, Tokens
from harness.data.token_rows import TokenPair, TokenRows, canonical_bytes, lengths_of, pair_lengths
from harness.study.files import write_jsonl
from harness.sweep.problems import load_run

PAIRS = [
    TokenPair("a", "p", (1, 2, 3), (4, 5), (6,)),
    TokenPair("b", "q", (), (7,), (8, 9, 2**31 - 1)),
    TokenPair("c", "p", (1,), (2, 3), (3, 2)),
]


def row(number: int) -> dict[str, Any]:
    return {"prompt": f"question {number}", "chosen": f"yes {number}", "rejected": f"no {number}", "extra": number}


def config_of(folder: Path, *more: str, count: int = KEPT_FROM) -> RunConfig:
    write_jsonl(folder / "train.jsonl", map(row, range(count)))
    for split, start in (("dev", 10_000), ("golden", 20_000)):
        rows = [{**row(number), "checks": [{"contains": "y"}]} for number in range(start, start + 3)]
        write_jsonl(folder / f"{split}.jsonl", rows)
    data = [f"data.{split}={folder / split}.jsonl" for split in ("train", "dev", "golden")]
    return load_run(["+method=dpo", *data, f"results_dir={folder / 'results'}", *more])


def entries(config: RunConfig) -> list[Path]:
    return sorted((Path(config.results_dir) / ".cache" / "data").glob("*/*.json"))


def same(found: Tokens, other: Tokens) -> bool:
    """Return whether two processes' tokens are the same in all that a study takes from them."""
    splits = ("train", "dev", "golden")
    facts = [(found.lengths, found.tables, found.findings), (other.lengths, other.tables, other.findings)]
    return facts[0] == facts[1] and all(getattr(found, split) == getattr(other, split) for split in splits)


class TestRows:
    def test_rows_over_one_buffer_are_the_pairs_that_were_given(self) -> None:
        rows = TokenRows.of(PAIRS)
        assert list(rows) == PAIRS == [rows[0], rows[1], rows[-1]]
        assert rows[1:] == tuple(PAIRS[1:])
        assert rows == PAIRS
        assert rows != [*PAIRS[:2], PAIRS[0]]
        assert (len(rows), len(TokenRows.of([]))) == (3, 0)
        assert all(type(token) is int for token in (*rows[1].rejected_ids, *rows[0].prompt_ids))
        with pytest.raises(IndexError):
            rows[3]

    def test_the_buffer_is_what_is_hashed(self) -> None:
        rows = TokenRows.of(PAIRS)
        each = [canonical_bytes(pair.prompt_ids, pair.chosen_ids, pair.rejected_ids) for pair in PAIRS]
        assert [rows.canonical_bytes(number) for number in range(3)] == each
        assert rows.buffer.tobytes() == b"".join(each)
        for number, pair in enumerate(PAIRS):
            alone = [canonical_bytes(pair.prompt_ids, ids, []) for ids in (pair.chosen_ids, pair.rejected_ids)]
            assert list(rows.answer_bytes(number)) == alone
        assert each[0] == np.array([3, 2, 1, 1, 2, 3, 4, 5, 6], dtype="<i4").tobytes()

    def test_lengths_are_those_of_the_pairs(self) -> None:
        for rows in (PAIRS, TokenRows.of(PAIRS)):
            assert lengths_of(rows).tolist() == [[3, 2, 1], [0, 1, 3], [1, 2, 2]]
            assert pair_lengths(rows).tolist() == [pair.length for pair in PAIRS]
        assert lengths_of([]).shape == (0, 3)
        assert TokenRows.of(PAIRS[:1]).distinct_ids == [1, 2, 3, 4, 5, 6]

    @pytest.mark.parametrize("cut", [1, -1])
    def test_a_buffer_of_other_pairs_is_refused(self, cut: int) -> None:
        rows = TokenRows.of(PAIRS)
        with pytest.raises(ValueError, match="are not the ids of 3 pairs"):
            TokenRows(rows.buffer[:cut], rows.names)

    @pytest.mark.parametrize("buffer", [np.array([-9, 1, 0, 5], "<i4"), np.zeros(3, "<f4"), np.zeros((1, 3), "<i4")])
    def test_numbers_that_are_no_pairs_are_refused(self, buffer: np.ndarray) -> None:
        with pytest.raises(ValueError, match=r"are not the ids of 1 pairs|32-bit integers in one row"):
            TokenRows(buffer, [("a", "p")])


class TestCache:
    def test_a_second_process_gets_the_same_from_the_cache(self, tmp_path: Path) -> None:
        config = config_of(tmp_path)
        first = Inputs()
        tokens, contents = first.tokens(config), first.contents(config)
        assert len(entries(config)) == 2
        second = Inputs()
        assert same(second.tokens(config), tokens)
        assert second.contents(config) == contents
        assert isinstance(second.tokens(config).train.rows.buffer, np.memmap)
        assert second.splits(config).facts == first.splits(config).facts
        assert second.splits(config).golden_pairs == first.splits(config).golden_pairs
        assert second.splits(config).golden_prompts == first.splits(config).golden_prompts
        assert [pair.pair_id for pair in second.splits(config).train] == [pair.pair_id for pair in tokens.train.rows]
        assert second.splits(config).train[5].chosen[0]["content"] == "yes 5"

    def test_the_cache_gives_what_a_run_without_it_gives(self, tmp_path: Path) -> None:
        config = config_of(tmp_path, "data.label_noise=0.3")
        Inputs().tokens(config)
        elsewhere = replace(config, results_dir=str(tmp_path / "other"))
        assert same(Inputs().tokens(config), Inputs().tokens(elsewhere))

    def test_small_data_leave_no_file(self, tmp_path: Path) -> None:
        config = config_of(tmp_path, count=20)
        Inputs().tokens(config)
        assert not Path(config.results_dir).exists()

    @pytest.mark.parametrize("name", ["train.npy", "golden.npy", "tokens.json", "splits.json"])
    @pytest.mark.parametrize("damage", ["change", "cut", "drop"])
    def test_a_damaged_entry_is_made_anew(self, name: str, damage: str, tmp_path: Path) -> None:
        config = config_of(tmp_path)
        tokens = Inputs().tokens(config)
        (path,) = (Path(config.results_dir) / ".cache" / "data").glob(f"*/{name}")
        content = bytearray(path.read_bytes())
        content[-9] ^= 1
        path.unlink()
        if damage != "drop":
            path.write_bytes(content if damage == "change" else content[:-9])
        assert same(Inputs().tokens(config), tokens)
        assert len(entries(config)) == 2
        assert same(Inputs().tokens(config), tokens)

    def test_an_entry_that_another_process_has_made_meanwhile_stays_in_its_place(self, tmp_path: Path) -> None:
        """Two jobs begin at once; the one that is done first has mapped its files when the other one is done."""
        config = config_of(tmp_path)
        first = Inputs().tokens(config)
        made = {path: path.stat().st_ino for path in (Path(config.results_dir) / ".cache" / "data").glob("*/*")}
        cache, about = DataCache(config.results_dir), ["its key"]
        cache.keep_tokens(about, first.by_split, first.facts)
        later = {path: path.stat().st_ino for path in (Path(config.results_dir) / ".cache" / "data").glob("*/*")}
        cache.keep_tokens(about, first.by_split, first.facts)
        kept = {path: path.stat().st_ino for path in (Path(config.results_dir) / ".cache" / "data").glob("*/*")}
        assert kept == later
        assert len(later) == len(made) + 4
        assert not list((Path(config.results_dir) / ".cache" / "data").glob(".*")), "nothing temporary is left"

    def test_other_contents_and_settings_are_other_entries(self, tmp_path: Path) -> None:
        config = config_of(tmp_path)
        tokens = Inputs().tokens(config)
        longest = int(pair_lengths(tokens.train.rows).max())
        shorter = Inputs().tokens(config_of(tmp_path, f"data.max_length={longest - 1}"))
        assert 0 < len(shorter.train.rows) < len(tokens.train.rows)
        other = config_of(tmp_path, count=KEPT_FROM + 1)
        assert len(Inputs().tokens(other).train.rows) == len(tokens.train.rows) + 1
        template = tmp_path / "own.jinja"
        template.write_text("{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}")
        own = config_of(tmp_path, f"model.chat_template={template}")
        assert Inputs().tokens(own).train.sha256 != tokens.train.sha256

    def test_a_folder_that_cannot_be_written_costs_the_cache_alone(self, tmp_path: Path) -> None:
        config = config_of(tmp_path)
        Path(config.results_dir).write_text("a file in its place")
        assert len(Inputs().tokens(config).train.rows) == KEPT_FROM

    def test_what_json_cannot_hold_is_read_anew(self, tmp_path: Path) -> None:
        config = config_of(tmp_path)
        lines = [json.dumps({**row(n), "checks": [{"json": True}], "cluster": 7}) for n in range(20_000, 20_003)]
        (tmp_path / "golden.jsonl").write_text("\n".join(lines))
        first = Inputs().splits(config)
        assert Inputs().splits(config).golden_prompts == first.golden_prompts
