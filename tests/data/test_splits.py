"""Files and data sets as people have them, split, checked for leaks, thinned and flipped: one behaviour a test."""

import csv
import gzip
import hashlib
import json
import re
from pathlib import Path

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.config.schema import DataConfig
from harness.data.conversations import prompt_key
from harness.data.formats import parse_row
from harness.data.records import Pair, prompt_id
from harness.data.sources import Source, read_source
from harness.data.splits import assign_split, flip_labels, load_splits, pair_digest
from harness.data.table import Table, table_warnings
from harness.study.errors import UsageError


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def row(i, prompt=None, **changes):
    return {
        "prompt": f"question {i}" if prompt is None else prompt,
        "chosen": f"good {i}",
        "rejected": f"bad {i}",
    } | changes


def write_jsonl(path: Path, rows) -> str:
    lines = [line if isinstance(line, str) else json.dumps(line) for line in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


@pytest.fixture
def files(tmp_path):
    """Write train, dev and golden files that share no prompt; a test replaces the rows it is about."""

    def write(**rows_by_split) -> DataConfig:
        given = {"train": [row(1)], "dev": [row(2)], "golden": [row(3)]} | rows_by_split
        return DataConfig(**{split: write_jsonl(tmp_path / f"{split}.jsonl", rows) for split, rows in given.items()})

    return write


def refusal(spec: DataConfig) -> str:
    with pytest.raises(UsageError) as error:
        load_splits(spec)
    return str(error.value)


def with_changes(spec: DataConfig, **changes) -> DataConfig:
    return DataConfig(**(vars(spec) | changes))


def read(path, key="data.train"):
    return read_source(str(path), key=key)


class TestFiles:
    ROWS = (
        row(1),
        row(2, prompt=[user("Hi"), assistant("Yo"), user("Bye")], chosen=[assistant("a")], rejected=[assistant("b")]),
    )

    def write(self, kind: str, path: Path) -> Path:
        turns = json.dumps
        match kind:
            case "jsonl":
                write_jsonl(path, self.ROWS)
            case "jsonl.gz":
                path.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in self.ROWS).encode()))
            case "json":
                path.write_text(json.dumps(self.ROWS))
            case "columns.json":
                path.write_text(json.dumps({name: [r[name] for r in self.ROWS] for name in self.ROWS[0]}))
            case "pandas.json":
                pd.DataFrame(self.ROWS).to_json(path)
            case "lines.json":
                write_jsonl(path, self.ROWS)
            case "csv":
                cells = [{k: v if isinstance(v, str) else turns(v) for k, v in r.items()} for r in self.ROWS]
                pd.DataFrame(cells).to_csv(path, index=False)
        return path

    @pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "columns.json", "pandas.json", "lines.json", "csv"])
    def test_every_kind_of_file_gives_the_same_rows(self, tmp_path, kind):
        assert [columns for _, columns in read(self.write(kind, tmp_path / f"a.{kind}")).rows] == list(self.ROWS)

    def test_parquet_gives_turns_as_they_were_written(self, tmp_path):
        rows = [{"chosen": [user("Hi"), assistant("a")], "rejected": [user("Hi"), assistant("b")], "score_chosen": 8.0}]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
        assert read(tmp_path / "a.parquet").rows == ((1, rows[0]),)

    def test_the_hash_is_that_of_the_files_bytes(self, tmp_path):
        path = Path(write_jsonl(tmp_path / "a.jsonl", self.ROWS))
        assert read(path).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()

    def test_rows_of_jsonl_are_numbered_by_line_and_blank_lines_are_no_rows(self, tmp_path):
        path = write_jsonl(tmp_path / "a.jsonl", [row(1), "", row(3), "  "])
        source = read(path)
        assert ([number for number, _ in source.rows], source.bad_rows) == ([1, 3], ())

    def test_the_suffix_may_be_in_capitals(self, tmp_path):
        path = self.write("jsonl.gz", tmp_path / "A.JSONL.GZ")
        assert [columns for _, columns in read(path).rows] == list(self.ROWS)

    def test_rows_of_csv_are_numbered_by_the_line_that_they_begin_on(self, tmp_path):
        path = tmp_path / "a.csv"
        pd.DataFrame([row(1, chosen="two\nlines"), row(2)]).to_csv(path, index=False)
        assert [number for number, _ in read(path).rows] == [2, 4]

    def test_separators_of_lines_inside_a_json_text_do_not_end_the_row(self, tmp_path):
        path = tmp_path / "a.jsonl"
        path.write_text(json.dumps(row(1, chosen="a\u2028b\x85c"), ensure_ascii=False), encoding="utf-8")
        assert read(path).rows[0][1]["chosen"] == "a\u2028b\x85c"

    @pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
    def test_a_byte_order_mark_and_windows_line_ends_are_not_data(self, tmp_path, kind):
        path = self.write(kind, tmp_path / f"a.{kind}")
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
        assert [columns for _, columns in read(path).rows] == list(self.ROWS)

    @pytest.mark.parametrize("cell", ["12", "1.50", "NA", "null", "None", "true", "[1, 2]", '{"value": 3}'])
    def test_cells_of_csv_stay_text(self, tmp_path, cell):
        pd.DataFrame([row(1, chosen=cell)]).to_csv(tmp_path / "a.csv", index=False)
        assert read(tmp_path / "a.csv").rows[0][1]["chosen"] == cell

    def test_an_empty_cell_of_csv_is_missing(self, tmp_path):
        pd.DataFrame([row(1, system="")]).to_csv(tmp_path / "a.csv", index=False)
        assert read(tmp_path / "a.csv").rows[0][1]["system"] is None

    def test_checks_in_csv_are_json(self, tmp_path):
        pd.DataFrame([{"prompt": "p", "checks": '[{"max_words": 3}]'}]).to_csv(tmp_path / "a.csv", index=False)
        assert read(tmp_path / "a.csv").rows[0][1]["checks"] == [{"max_words": 3}]

    def test_turns_that_pandas_wrote_to_csv_as_python_are_a_bad_row(self, tmp_path):
        pd.DataFrame([row(1, chosen=[assistant("a")])]).to_csv(tmp_path / "a.csv", index=False)
        (bad,) = read(tmp_path / "a.csv").bad_rows
        assert "`chosen` looks like turns or checks and is not JSON" in bad.reason
        assert "json.dumps" in bad.reason

    def test_a_long_cell_of_csv_is_read(self, tmp_path):
        pd.DataFrame([row(1, chosen="x" * 200_000)]).to_csv(tmp_path / "a.csv", index=False)
        before = csv.field_size_limit()
        assert len(read(tmp_path / "a.csv").rows[0][1]["chosen"]) == 200_000
        assert csv.field_size_limit() == before

    @pytest.mark.parametrize(
        ("line", "reason"),
        [
            ('{"prompt": "a"', "not JSON (Expecting ',' delimiter at character 15 of the line)"),
            ("[1]", "a JSON list; allowed: one object a line"),
            ('{"chosen": "a", "chosen": "b"}', "one key twice"),
            ("[" * 100_000, "not JSON"),
        ],
    )
    def test_a_broken_line_is_a_bad_row_with_its_number(self, tmp_path, line, reason):
        source = read(write_jsonl(tmp_path / "a.jsonl", [row(1), line, row(3)]))
        assert [number for number, _ in source.rows] == [1, 3]
        (bad,) = source.bad_rows
        assert bad.row == 2
        assert reason in bad.reason

    def test_a_line_that_is_not_utf8_is_a_bad_row(self, tmp_path):
        (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "caf\xe9"}\n')
        (bad,) = read(tmp_path / "a.jsonl").bad_rows
        assert "not UTF-8" in bad.reason

    def test_a_csv_row_with_too_few_cells_is_a_bad_row(self, tmp_path):
        (tmp_path / "a.csv").write_text("prompt,chosen,rejected\na,b,c\na,b\n")
        (bad,) = read(tmp_path / "a.csv").bad_rows
        assert (bad.row, bad.reason) == (3, "2 cells under 3 columns; is a comma or a quotation mark missing?")

    def test_an_element_of_a_json_array_that_is_no_object_is_a_bad_row(self, tmp_path):
        (tmp_path / "a.json").write_text(json.dumps([row(1), "x"]))
        (bad,) = read(tmp_path / "a.json").bad_rows
        assert (bad.row, bad.reason) == (2, "a JSON str; allowed: an object")

    @pytest.mark.parametrize(
        ("name", "content", "reason"),
        [
            ("a.json", b'[{"prompt": "a"', "cannot be read as json"),
            (
                "a.json",
                b'{"prompt": ["a", "b"], "chosen": ["c"]}',
                "neither an array of rows nor an object of columns of one length",
            ),
            ("a.json", b'{"prompt": "a", "chosen": "c"}', "neither an array of rows nor an object of columns"),
            ("a.json", b"7", "neither an array of rows"),
            ("a.json", b'["\xe9"]', "utf-8"),
            ("a.json", b"[" * 100_000, "cannot be read as json"),
            ("a.csv", b'prompt,chosen\na,"b\nc,d\n', "unexpected end of data"),
            ("a.parquet", b"PAR1 broken", "cannot be read as parquet"),
            ("a.jsonl.gz", b"not gzip", "cannot be read as jsonl"),
            ("a.jsonl.gz", gzip.compress(b"{}" * 99, mtime=0)[:-9], "cannot be read as jsonl"),
        ],
    )
    def test_a_file_that_is_broken_as_a_whole_is_refused_with_the_reason(self, tmp_path, name, content, reason):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UsageError, match=f"data.dev={tmp_path / name}: .*{reason}"):
            read(tmp_path / name, key="data.dev")

    @pytest.mark.parametrize(
        "reference", ["missing.jsonl", "./missing", "/missing/a", "~/missing/a", "missing.parquet", "a/b.json"]
    )
    def test_a_file_that_does_not_exist_is_refused_with_what_is_allowed(self, reference):
        with pytest.raises(UsageError) as error:
            read(reference, key="data.golden")
        assert f"data.golden={reference}: no such file; allowed: a .jsonl, .json, .parquet or .csv file" in str(
            error.value
        )

    def test_a_file_of_another_kind_is_refused(self, tmp_path):
        (tmp_path / "a.txt").write_text("hello")
        with pytest.raises(UsageError, match=r"files of kind \.txt are not read; allowed: a \.jsonl"):
            read(tmp_path / "a.txt")

    @pytest.mark.parametrize("reference", ["pairs", "a/b/c", "https://example.org/pairs"])
    def test_a_name_that_is_neither_file_nor_hub_name_is_refused(self, reference):
        with pytest.raises(UsageError, match=r"neither a file nor a Hub name; allowed: .*owner/name"):
            read(reference)


class TestHub:
    """A folder goes the way of a Hub data set; the Hub itself is not reached here."""

    @pytest.fixture
    def handbook(self, tmp_path, monkeypatch):
        """A folder laid out as UltraFeedback-binarized is, with the splits train_prefs and test_prefs."""
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        folder = tmp_path / "ultrafeedback"
        folder.mkdir()
        for split, start in (("train_prefs", 0), ("test_prefs", 50)):
            conversations = [
                {
                    "prompt": f"q {i}",
                    "chosen": [user(f"q {i}"), assistant("a")],
                    "rejected": [user(f"q {i}"), assistant("b")],
                }
                for i in range(start, start + 20)
            ]
            write_jsonl(
                folder / f"{split}.jsonl", [c | {"score_chosen": 8.0, "score_rejected": 5.0} for c in conversations]
            )
        splits = "".join(f"  - split: {s}\n    path: {s}.jsonl\n" for s in ("train_prefs", "test_prefs"))
        (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n{splits}---\n")
        return folder

    def test_splits_of_a_data_set_are_named_behind_a_colon(self, handbook):
        splits = load_splits(DataConfig(train=f"{handbook}:train_prefs", golden=f"{handbook}:test_prefs"))
        assert (len(splits.golden_prompts), splits.facts["golden"]["form"]) == (20, "UltraFeedback-binarized")
        assert splits.train[0].prompt == (user("q 0"),)

    def test_the_handbooks_recipe_that_trains_on_the_test_split_is_refused(self, handbook):
        # alignment-handbook, recipes/zephyr-7b-beta/dpo/config_full.yaml: train_prefs and test_prefs are mixed
        message = refusal(DataConfig(train=f"{handbook}:train_prefs+test_prefs", golden=f"{handbook}:test_prefs"))
        assert "20 golden prompts occur in the data that models are trained or selected on" in message

    def test_the_handbooks_random_split_of_the_mixture_would_leak_and_the_split_by_prompt_does_not(self, handbook):
        splits = load_splits(DataConfig(path=f"{handbook}:train_prefs+test_prefs+test_prefs"))
        train, golden = ({item.prompt_id for item in items} for items in (splits.train, splits.golden_prompts))
        assert train
        assert golden
        assert not train & golden

    def test_the_hash_of_a_data_set_is_that_of_its_rows(self, handbook):
        first, again, other = (read(f"{handbook}:{s}").sha256 for s in ("train_prefs", "train_prefs", "test_prefs"))
        assert first == again != other

    def test_a_data_set_of_several_splits_needs_the_name_of_one(self, handbook):
        with pytest.raises(UsageError) as error:
            read(handbook)
        assert "has the splits train_prefs, test_prefs; name one" in str(error.value)

    def test_an_unknown_split_is_refused_with_those_there_are(self, handbook):
        with pytest.raises(UsageError, match=r"Should be one of.*train_prefs.*check the name, the split"):
            read(f"{handbook}:test")

    def test_the_only_split_needs_no_name(self, tmp_path, monkeypatch):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        (tmp_path / "one").mkdir()
        write_jsonl(tmp_path / "one" / "test.jsonl", [row(1)])
        assert read(tmp_path / "one", key="data.golden").rows == ((1, row(1)),)

    def test_the_split_called_train_is_taken_for_training_and_for_nothing_else(self, tmp_path, monkeypatch):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        (tmp_path / "two").mkdir()
        for i, split in enumerate(("test", "train")):
            write_jsonl(tmp_path / "two" / f"{split}.jsonl", [row(i)])
        assert read(tmp_path / "two", key="data.train").rows == ((1, row(1)),)
        with pytest.raises(UsageError, match="name one"):
            read(tmp_path / "two", key="data.golden")

    def test_a_hub_that_cannot_be_reached_says_what_to_do(self, monkeypatch):
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(UsageError) as error:
            read("nobody/no-such-data-set:train", key="data.path")
        message = str(error.value)
        assert message.startswith("data.path=nobody/no-such-data-set:train: cannot be loaded with datasets")
        assert "Hub" in message
        assert "HF_HUB_OFFLINE unset" in message
        assert "download the file and give its path" in message

    @pytest.mark.parametrize(("revision", "warned"), [(None, True), ("0123abc", False)])
    def test_hub_data_without_a_revision_are_warned_of(self, revision, warned):
        source = Source("owner/name", "00", ((1, row(1)),), (), from_hub=True)
        warnings = list(table_warnings(Table("data.train", source, (), ()), revision=revision))
        assert (
            warnings == ["data.train=owner/name: no data.revision; the Hub's data may change between runs"]
        ) == warned

    def test_a_revision_without_hub_data_is_refused(self, files):
        assert refusal(with_changes(files(), revision="abc")).startswith(
            "data.revision=abc: none of the data is from the Hub"
        )


class TestWhichKeys:
    def test_three_files_are_three_splits(self, files):
        splits = load_splits(files())
        assert [p.chosen[0]["content"] for p in (*splits.train, *splits.dev_pairs, *splits.golden_pairs)] == [
            "good 1",
            "good 2",
            "good 3",
        ]

    def test_no_training_data_is_refused(self, files):
        assert refusal(with_changes(files(), train=None)).startswith("data.train=null")

    def test_no_golden_data_is_refused(self, files):
        assert refusal(with_changes(files(), golden=None)).startswith("data.golden=null")

    def test_a_path_that_nothing_needs_is_refused(self, files):
        spec = files()
        assert "data.train, data.dev and data.golden are all given" in refusal(with_changes(spec, path=spec.train))

    def test_dev_that_is_not_given_is_taken_out_of_train_by_prompt_with_a_warning(self, files):
        spec = with_changes(
            files(train=[row(i, chosen=c) for i in range(40) for c in "ab"], golden=[row(99)]), dev=None
        )
        splits = load_splits(spec)
        assert len(splits.train) + len(splits.dev_pairs) == 80
        assert len(splits.dev_pairs) == 2 * len(splits.dev_prompts) > 0
        assert not {p.prompt_id for p in splits.train} & {p.prompt_id for p in splits.dev_prompts}
        assert (
            f"{len(splits.dev_prompts)} prompts ({len(splits.dev_pairs)} pairs) of data.train became dev"
            in splits.facts["warnings"][0]
        )

    def test_a_path_gives_only_the_splits_that_have_no_file(self, files):
        spec = files(train=[row(i) for i in range(50)])
        splits = load_splits(DataConfig(path=spec.train, golden=write_jsonl(Path(spec.golden), [row(99)])))
        assert len(splits.train) + len(splits.dev_pairs) == 50
        assert [p.prompt for p in splits.golden_prompts] == [(user("question 99"),)]

    def test_a_path_beside_train_is_split_between_dev_and_golden(self, files):
        spec = files(train=[row(99)], dev=[row(i) for i in range(60)])
        splits = load_splits(DataConfig(path=spec.dev, train=spec.train))
        assert (len(splits.train), len(splits.dev_pairs) + len(splits.golden_pairs)) == (1, 60)
        assert len(splits.golden_pairs) > len(splits.dev_pairs) > 0

    def test_problems_of_all_files_are_in_one_message(self, files):
        message = refusal(files(train=["{"], golden=[{"text": "x"}]))
        assert "data.train=" in message
        assert "data.golden=" in message


class TestRefusedFiles:
    @pytest.mark.parametrize("name", ["empty.jsonl", "empty.json", "empty.csv"])
    def test_an_empty_file(self, files, tmp_path, name):
        (tmp_path / name).write_text("")
        assert "has no rows" in refusal(with_changes(files(), dev=str(tmp_path / name)))

    def test_a_file_of_an_unknown_form_shows_its_columns_and_the_known_forms(self, files):
        message = refusal(files(train=[{"prompt": "p", "completion": "c", "label": True}]))
        assert "its columns match no form (found: completion, label, prompt)" in message
        for name in ("TRL standard", "TRL conversational", "UltraFeedback", "HH-RLHF", "ShareGPT"):
            assert name in message
        assert "`checks`" not in message

    def test_an_evaluation_file_of_an_unknown_form_is_told_of_checks(self, files):
        assert "prompts with `checks`" in refusal(files(golden=[{"text": "p", "kwargs": {}}]))

    def test_more_bad_rows_than_allowed_are_refused_with_the_first_ten_their_number_and_the_limit(self, files):
        rows = [row(i, prompt="" if i < 12 else f"q {i}") for i in range(100)]
        message = refusal(files(train=rows))
        assert "12 of 100 rows cannot be used (12.0%; data.max_bad_fraction allows 1.0%)" in message
        assert message.count("the prompt is empty") == 10
        assert "train.jsonl:1: " in message
        assert "train.jsonl:10: " in message
        assert "train.jsonl:11: " not in message
        assert "raise data.max_bad_fraction" in message

    def test_as_many_bad_rows_as_allowed_are_left_out_listed_and_warned_of(self, files):
        splits = load_splits(files(train=[row(i) for i in range(4, 103)] + ["{"]))
        facts = splits.facts["train"]
        assert (len(splits.train), facts["rows"], len(facts["bad_rows"])) == (99, 100, 1)
        assert "train.jsonl:100: not JSON" in facts["bad_rows"][0]
        assert "data.train: 1 of 100 rows cannot be used and were left out" in splits.facts["warnings"]

    def test_a_file_of_bad_rows_only_is_refused_whatever_the_limit(self, files):
        assert "1 of 1 rows cannot be used" in refusal(
            with_changes(files(train=[row(1, prompt="")]), max_bad_fraction=1.0)
        )

    def test_a_training_row_with_checks_only_is_bad(self, files):
        assert "`chosen` is missing" in refusal(files(train=[row(1), {"prompt": "p", "checks": [{"json": True}]}]))


class TestEvaluationFiles:
    def test_pairs_of_one_prompt_are_all_kept_and_the_prompt_appears_once(self, files):
        splits = load_splits(files(golden=[row(3), row(3, chosen="better"), row(4)]))
        assert [len(splits.golden_pairs), len(splits.golden_prompts)] == [3, 2]
        assert splits.golden_prompts[0].prompt_id == prompt_id([user("question 3")]) == splits.golden_pairs[1].prompt_id

    def test_a_golden_file_may_hold_checks_only(self, files):
        splits = load_splits(files(golden=[{"prompt": "p", "checks": [{"json": True}]}]))
        assert (splits.golden_prompts[0].checks, splits.golden_pairs) == (({"json": True},), ())

    def test_checks_and_cluster_may_stand_on_any_row_of_the_prompt(self, files):
        splits = load_splits(files(golden=[row(3), row(3, chosen="better", checks=[{"json": True}], cluster="c")]))
        (prompt,) = splits.golden_prompts
        assert (prompt.checks, prompt.cluster, prompt.row) == (({"json": True},), "c", 1)

    def test_a_prompt_that_rows_without_pairs_ask_again_is_a_prompt_of_its_own_in_one_cluster(self, files):
        asked = [
            {"prompt": text, "checks": [{"max_words": 3}]} for text in ("Name a tree", "Name a bird", "Name a tree")
        ]
        first, other, again = load_splits(files(golden=asked)).golden_prompts
        assert [again.prompt_id, again.prompt, again.checks] == [f"{first.prompt_id}#1", first.prompt, first.checks]
        assert (again.cluster, other.cluster) == (first.cluster, None)

    def test_pairs_of_one_prompt_share_it_and_a_row_that_asks_it(self, files):
        rows = [row(3), row(3, chosen="better"), {"prompt": row(3)["prompt"], "checks": [{"json": True}]}]
        splits = load_splits(files(golden=rows))
        assert [prompt.checks for prompt in splits.golden_prompts] == [({"json": True},)]
        assert len(splits.golden_pairs) == 2

    @pytest.mark.parametrize(
        ("column", "values"), [("checks", ([{"json": True}], [{"max_words": 2}])), ("cluster", ("a", "b"))]
    )
    def test_rows_of_one_prompt_that_disagree_are_bad(self, files, column, values):
        rows = [row(3, **{column: values[0]}), row(3, chosen="better", **{column: values[1]})]
        assert f"golden.jsonl:2: `{column}` is not that of row 1, which has the same prompt" in refusal(
            files(golden=rows)
        )

    def test_a_malformed_check_is_a_bad_row(self, files):
        message = refusal(files(golden=[row(3, checks=[{"max_words": -1}])]))
        assert "golden.jsonl:1: check `max_words`: -1; allowed: a positive whole number" in message

    def test_prompts_without_checks_beside_prompts_with_them_are_warned_of(self, files):
        splits = load_splits(files(golden=[row(3), row(4, checks=[{"json": True}])]))
        assert "golden: 1 of 2 prompts have no checks and stay unscored by them" in splits.facts["warnings"]

    def test_prompts_that_all_have_checks_are_not_warned_of(self, files):
        assert load_splits(files(golden=[row(3, checks=[{"json": True}])])).facts["warnings"] == []

    def test_prompts_that_differ_in_case_only_are_warned_of_unless_they_have_a_cluster(self, files):
        rows = [row(3), row(3, prompt="QUESTION 3")]
        (warning,) = load_splits(files(golden=rows)).facts["warnings"]
        assert "golden: 1 prompts are others in different white space or case" in warning
        assert load_splits(files(golden=[r | {"cluster": 1} for r in rows])).facts["warnings"] == []

    def test_an_id_that_several_pairs_have_is_made_unique_with_the_row(self, files):
        splits = load_splits(files(golden=[row(3, id="a"), row(3, chosen="better", id="a")]))
        assert [pair.pair_id for pair in splits.golden_pairs] == ["a", "a#2"]


class TestLeaks:
    @pytest.mark.parametrize("split", ["train", "dev"])
    def test_a_golden_prompt_in_train_or_dev_is_refused_with_file_and_row_of_both(self, files, split):
        message = refusal(files(**{split: [row(5), row(9)], "golden": [row(6), row(7), row(9)]}))
        assert "1 golden prompt occurs" in message
        assert (
            f"golden.jsonl:3 = {Path(files().golden).parent / split}.jsonl:2 ({split}, same text): question 9"
            in message
        )

    def test_a_golden_prompt_that_differs_in_white_space_and_case_is_refused(self, files):
        message = refusal(files(train=[row(1, prompt="  WHAT\n is it?")], golden=[row(2, prompt="What is  it?")]))
        assert "same after folding white space and case" in message

    def test_the_last_user_turn_counts_alone_where_the_prompt_has_no_other(self, files):
        asked = [{"role": "system", "content": "Be brief."}, user("question 3")]
        leaking = row(1, prompt=asked, chosen=[assistant("a")], rejected=[assistant("b")])
        assert "1 golden prompt occurs" in refusal(files(train=[leaking]))

    def test_the_last_user_turn_does_not_count_alone_where_the_prompt_has_others(self, files):
        turns = [user("Hi"), assistant("Hello."), user("question 3")]
        splits = load_splits(files(train=[row(1, prompt=turns, chosen=[assistant("a")], rejected=[assistant("b")])]))
        assert len(splits.golden_prompts) == 1

    def test_whole_conversations_are_compared(self, files):
        turns, loud = ([user("Hi"), assistant("Hello."), user(text)] for text in ("and now?", "AND NOW?"))
        answers = {"chosen": [assistant("a")], "rejected": [assistant("b")]}
        assert "1 golden prompt occurs" in refusal(
            files(train=[row(1, prompt=turns, **answers)], golden=[row(2, prompt=loud, **answers)])
        )

    def test_ten_leaks_are_shown_and_all_are_counted(self, files):
        rows = [row(i) for i in range(10, 23)]
        message = refusal(files(train=rows, golden=rows))
        assert "13 golden prompts occur" in message
        assert "The first 10:" in message
        assert message.count("same text") == 10

    def test_rows_that_a_limit_would_drop_leak_too(self, files):
        spec = files(train=[row(i) for i in range(10, 40)], golden=[row(39)])
        assert "1 golden prompt occurs" in refusal(with_changes(spec, max_train_pairs=1))

    def test_dev_prompts_in_train_are_warned_of(self, files):
        (warning,) = load_splits(files(train=[row(1), row(2)], dev=[row(5), row(2)])).facts["warnings"]
        assert warning.startswith("1 dev prompts occur in train")
        assert "row 2 = row 2" in warning

    def test_ten_dev_prompts_in_train_are_shown_and_all_are_counted(self, files):
        rows = [row(i) for i in range(10, 23)]
        (warning,) = load_splits(files(train=rows, dev=rows)).facts["warnings"]
        assert warning.startswith("13 dev prompts occur in train")
        assert warning.count("= row") == 10

    def test_hidden_characters_of_a_leaking_prompt_are_shown_as_escapes(self, files):
        message = refusal(files(train=[row(1, prompt="a\x1b[2Jb")], golden=[row(1, prompt="a\x1b[2Jb")]))
        assert "a\\x1b[2Jb" in message


class TestSplitOfOneFile:
    @pytest.fixture
    def one_file(self, tmp_path):
        rows = [row(i, chosen=f"good {i} {c}") for i in range(60) for c in "abc"]
        return DataConfig(path=write_jsonl(tmp_path / "all.jsonl", rows))

    def test_every_pair_is_in_one_split_and_every_prompt_too(self, one_file):
        splits = load_splits(one_file)
        parts = [splits.train, splits.dev_pairs, splits.golden_pairs]
        assert sum(map(len, parts)) == 180
        ids = [{pair.prompt_id for pair in part} for part in parts]
        assert sum(map(len, ids)) == len(set.union(*ids)) == 60

    def test_shares_are_those_of_the_prompts(self, tmp_path):
        path = write_jsonl(tmp_path / "all.jsonl", [row(i) for i in range(2000)])
        splits = load_splits(DataConfig(path=path, dev_fraction=0.1, golden_fraction=0.3))
        assert len(splits.dev_prompts) == pytest.approx(200, abs=50)
        assert len(splits.golden_prompts) == pytest.approx(600, abs=75)

    def test_another_seed_is_another_split_and_the_same_seed_the_same(self, one_file):
        first, again, other = (
            load_splits(with_changes(one_file, split_seed=seed)).golden_prompts for seed in (0, 0, 1)
        )
        assert first == again
        assert {p.prompt_id for p in first} != {p.prompt_id for p in other}

    def test_golden_does_not_depend_on_the_share_of_dev(self, one_file):
        first, other = (load_splits(with_changes(one_file, dev_fraction=share)).golden_prompts for share in (0.1, 0.5))
        assert first == other

    def test_checks_of_the_file_reach_golden(self, tmp_path):
        path = write_jsonl(tmp_path / "all.jsonl", [row(i, checks=[{"max_words": 3}]) for i in range(60)])
        assert all(p.checks == ({"max_words": 3},) for p in load_splits(DataConfig(path=path)).golden_prompts)

    @pytest.mark.parametrize("split", ["dev", "golden"])
    def test_too_few_prompts_for_a_split_are_refused(self, one_file, split):
        message = refusal(with_changes(one_file, **{f"{split}_fraction": 1e-9}))
        assert f"its 60 prompts leave none for {split}" in message
        assert f"set data.{split} to a file" in message

    @settings(max_examples=25)
    @given(st.lists(st.text(alphabet="abAB \n\u00e9", min_size=1), min_size=1), st.integers(0, 5))
    def test_prompts_that_count_as_the_same_go_to_the_same_split(self, texts, seed):
        shares = {"golden": 0.3, "dev": 0.3, "train": 0.4}
        for text in texts:
            variants = [text, text.upper(), f" {text}\n", text.replace(" ", "\n\t ")]
            keys = [prompt_key([user(variant)]) for variant in variants]
            assert len({assign_split(key, shares, seed) for key in keys}) == 1

    def test_composed_and_decomposed_accents_count_as_the_same(self):
        assert prompt_key([user("caf\u00e9")]) == prompt_key([user("cafe\u0301")])

    @settings(max_examples=20, deadline=None)
    @given(st.permutations(range(30)), st.integers(0, 29))
    def test_no_order_and_no_other_row_changes_where_a_prompt_goes(self, tmp_path_factory, order, left_out):
        folder = tmp_path_factory.mktemp("split")
        where = []
        for rows in ([row(i) for i in range(30)], [row(i) for i in order if i != left_out]):
            splits = load_splits(
                DataConfig(path=write_jsonl(folder / "all.jsonl", rows), dev_fraction=0.3, golden_fraction=0.4)
            )
            parts = {"train": splits.train, "dev": splits.dev_prompts, "golden": splits.golden_prompts}
            where.append({item.prompt_id: name for name, part in parts.items() for item in part})
        del where[0][prompt_id([user(f"question {left_out}")])]
        assert where[0] == where[1]


class TestLimits:
    def test_a_limit_keeps_a_fixed_subset_that_is_not_the_first_rows(self, files):
        spec = files(train=[row(i) for i in range(100, 200)])
        kept = [pair.row for pair in load_splits(with_changes(spec, max_train_pairs=20)).train]
        assert len(kept) == 20
        assert kept == sorted(kept)
        assert kept != list(range(1, 21))

    def test_a_larger_limit_keeps_what_a_smaller_one_kept(self, files):
        spec = files(train=[row(i) for i in range(100, 200)])
        small, large = ({p.row for p in load_splits(with_changes(spec, max_train_pairs=n)).train} for n in (10, 30))
        assert small < large

    def test_the_subset_does_not_depend_on_the_order_of_the_rows(self, files):
        rows = [row(i) for i in range(100, 200)]
        kept = [
            {pair.prompt_id for pair in load_splits(with_changes(files(train=given), max_train_pairs=20)).train}
            for given in (rows, rows[::-1])
        ]
        assert kept[0] == kept[1]

    @pytest.mark.parametrize("split", ["dev", "golden"])
    def test_a_limit_on_prompts_keeps_all_pairs_of_each(self, files, split):
        spec = files(**{split: [row(i, chosen=c) for i in range(100, 130) for c in "ab"]})
        splits = load_splits(with_changes(spec, **{f"max_{split}_prompts": 5}))
        prompts, pairs = getattr(splits, f"{split}_prompts"), getattr(splits, f"{split}_pairs")
        assert (len(prompts), len(pairs)) == (5, 10)
        assert {p.prompt_id for p in prompts} == {p.prompt_id for p in pairs}
        assert {p.prompt_id for p in prompts} != {prompt_id([user(f"question {i}")]) for i in range(100, 105)}

    def test_a_limit_that_is_not_reached_changes_nothing(self, files):
        spec = files()
        assert load_splits(with_changes(spec, max_train_pairs=9)).train == load_splits(spec).train


def make_pairs(n: int) -> list[Pair]:
    columns = frozenset({"prompt", "chosen", "rejected"})
    rows = (parse_row(row(i), i, columns, needs_pair=True, reads_checks=False) for i in range(1, n + 1))
    return [parsed.pair() for parsed in rows]


class TestLabelNoise:
    @settings(max_examples=40)
    @given(st.integers(0, 40), st.floats(0, 1), st.integers(0, 3))
    def test_exactly_the_rounded_share_is_flipped_and_nothing_else_changes(self, n, share, seed):
        pairs = make_pairs(n)
        noisy, record = flip_labels(pairs, share, seed=seed)
        changed = [(a, b) for a, b in zip(pairs, noisy, strict=True) if a != b]
        assert len(changed) == record["flipped"] == round(share * n)
        assert all((a.prompt, a.chosen, a.rejected) == (b.prompt, b.rejected, b.chosen) for a, b in changed)

    @settings(max_examples=20)
    @given(st.permutations(range(20)))
    def test_which_pairs_are_flipped_does_not_depend_on_their_order(self, order):
        pairs = make_pairs(20)
        straight, record = flip_labels(pairs, 0.4, seed=0)
        shuffled, other = flip_labels([pairs[i] for i in order], 0.4, seed=0)
        assert {pair_digest(pair) for pair in straight} == {pair_digest(pair) for pair in shuffled}
        assert record == other

    def test_another_seed_flips_others(self):
        (_, first), (_, other) = (flip_labels(make_pairs(20), 0.4, seed=seed) for seed in (0, 1))
        assert first["flipped_sha256"] != other["flipped_sha256"]

    def test_a_larger_share_flips_what_a_smaller_one_flipped(self):
        pairs = make_pairs(30)
        some, more = (flip_labels(pairs, share, seed=0)[0] for share in (0.2, 0.5))
        assert all(more[i] != pairs[i] for i in range(30) if some[i] != pairs[i])

    def test_dev_and_golden_are_never_flipped_and_the_flips_are_recorded(self, files):
        spec = files(train=[row(i) for i in range(10, 20)])
        clean, noisy = load_splits(spec), load_splits(with_changes(spec, label_noise=1.0, label_noise_seed=3))
        assert [pair.chosen[0]["content"] for pair in noisy.train] == [f"bad {i}" for i in range(10, 20)]
        assert (noisy.dev_pairs, noisy.golden_pairs) == (clean.dev_pairs, clean.golden_pairs)
        record = noisy.facts["label_noise"]
        assert (record["share"], record["seed"], record["flipped"], len(record["flipped_sha256"])) == (1.0, 3, 10, 64)

    def test_the_share_is_that_of_the_pairs_that_are_trained_on(self, files):
        spec = with_changes(files(train=[row(i) for i in range(10, 60)]), max_train_pairs=10, label_noise=0.5)
        assert load_splits(spec).facts["label_noise"]["flipped"] == 5


class TestWarnings:
    def test_clean_data_give_none(self, files):
        assert load_splits(files()).facts["warnings"] == []

    def test_repeated_pairs_are_kept_and_counted(self, files):
        splits = load_splits(files(train=[row(1), row(1), row(1), row(4)]))
        assert len(splits.train) == 4
        assert "train: 2 of 4 pairs repeat an earlier one (kept)" in splits.facts["warnings"]

    def test_pairs_that_contradict_each_other_are_kept_and_counted(self, files):
        splits = load_splits(files(train=[row(1), row(1, chosen="bad 1", rejected="good 1"), row(4)]))
        assert len(splits.train) == 3
        assert splits.facts["warnings"] == [
            "train: 2 of 3 pairs contradict another: the same answers, exchanged (kept)"
        ]

    def test_ties_are_counted(self, files):
        (warning,) = load_splits(files(train=[row(1, score_chosen=5, score_rejected=5), row(4)])).facts["warnings"]
        assert "data.train: 1 of 2 rows score both answers the same" in warning

    def test_a_guessed_prompt_is_shown(self, files):
        (warning,) = load_splits(files(train=[{"chosen": "Say it: yes", "rejected": "Say it: no"}])).facts["warnings"]
        assert "1 rows have no prompt column" in warning
        assert "'Say it:'" in warning

    def test_answers_of_several_turns_are_counted(self, files):
        answer = [assistant("a"), user("b"), assistant("c")]
        splits = load_splits(files(train=[row(1, prompt=[user("Hi")], chosen=answer, rejected=[assistant("x")])]))
        assert "the answers of 1 rows have several turns" in splits.facts["warnings"][0]


def test_facts_are_json_and_name_file_form_hash_and_counts(files):
    spec = files(train=[row(1), row(1, chosen="better"), row(4)])
    facts = load_splits(spec).facts
    assert json.loads(json.dumps(facts)) == facts
    assert facts["train"] == {
        "path": spec.train,
        "form": "TRL standard, explicit prompt",
        "sha256": hashlib.sha256(Path(spec.train).read_bytes()).hexdigest(),
        "rows": 3,
        "pairs": 3,
        "prompts": 2,
        "bad_rows": [],
    }


def test_a_file_of_several_forms_names_them_most_frequent_first(files):
    turns = {"prompt": [user("Hi")], "chosen": [assistant("a")], "rejected": [assistant("b")]}
    facts = load_splits(files(train=[turns, row(1), row(4)])).facts
    assert facts["train"]["form"] == "TRL standard, explicit prompt; TRL conversational, explicit prompt"


@pytest.mark.shared
class TestRealData:
    def test_alpacaeval_short_has_its_pairs_and_prompts_and_no_warning(self, shared):
        folder = shared / "data" / "alpacaeval_short"
        splits = load_splits(
            DataConfig(**{split: str(folder / f"{split}.jsonl") for split in ("train", "dev", "golden")})
        )
        assert [len(splits.train), len(splits.dev_pairs), len(splits.golden_pairs)] == [414, 57, 109]
        prompts = {pair.prompt_id for pair in splits.train}, splits.dev_prompts, splits.golden_prompts
        assert [len(part) for part in prompts] == [190, 30, 50]
        assert splits.facts["warnings"] == []

    def test_the_llama_factory_demo_loads_as_it_is(self, shared):
        splits = load_splits(DataConfig(path=str(shared / "data" / "dpo_en_demo.json")))
        assert len(splits.train) + len(splits.dev_pairs) + len(splits.golden_pairs) == 300
        assert splits.facts["train"]["form"] == "ShareGPT"
        assert splits.facts["train"]["bad_rows"] == []
        assert {pair.prompt[0]["role"] for pair in splits.train} == {"system", "user"}

    def test_ifevals_prompts_load_with_their_instructions(self, shared):
        pairs, ifeval = (str(shared / "data" / name) for name in ("dpo_en_demo.json", "ifeval_input_data.jsonl"))
        splits = load_splits(DataConfig(path=pairs, golden=ifeval))
        assert len(splits.golden_prompts) == 541
        assert splits.facts["golden"]["bad_rows"] == []
        first = splits.golden_prompts[0].about
        assert first["id"] == "1000"
        assert first["instructions"]["instruction_id_list"][0] == "punctuation:no_comma"
        assert first["instructions"]["kwargs"][1] == {"num_highlights": 3}


class TestWholeSources:
    """A source is read as a whole, or refused with the name of the part that would stay unread."""

    @pytest.fixture(autouse=True)
    def cache(self, tmp_path, monkeypatch):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    @pytest.fixture
    def folder(self, tmp_path):
        (tmp_path / "pairs").mkdir()
        return tmp_path / "pairs"

    def test_all_files_of_a_folder_are_read(self, folder):
        for i in range(3):
            write_jsonl(folder / f"part{i}.jsonl", [row(i)])
        (folder / "README.md").write_text("# Pairs\n")
        (folder / "LICENSE").write_text("free\n")
        assert [found["prompt"] for _, found in read(folder).rows] == ["question 0", "question 1", "question 2"]

    @pytest.mark.parametrize("other", ["more.parquet", "more.csv", "notes.txt", "notes.xml", "deep/er/more.arrow"])
    def test_a_file_that_would_stay_unread_is_named(self, folder, other):
        for i in range(2):
            write_jsonl(folder / f"part{i}.jsonl", [row(i)])
        (folder / other).parent.mkdir(parents=True, exist_ok=True)
        (folder / other).write_bytes(b"prompt,chosen,rejected\na,b,c\n")
        with pytest.raises(UsageError, match=rf"1 of its files would not be read \({re.escape(other)}\)"):
            read(folder)

    @pytest.mark.parametrize("key", ["data.path", "data.golden"])
    def test_a_second_split_is_named(self, folder, key):
        for split in ("train", "test"):
            write_jsonl(folder / f"{split}.jsonl", [row(split)])
        with pytest.raises(UsageError, match=r"has the splits train, test; name one, as .*:train, or several"):
            read(folder, key=key)

    def test_training_takes_train_beside_splits_that_evaluate_and_beside_no_other(self, folder):
        for split in ("train", "test", "validation"):
            write_jsonl(folder / f"{split}.jsonl", [row(split)])
        assert [found["prompt"] for _, found in read(folder).rows] == ["question train"]
        names = "".join(f"  - split: {name}\n    path: {name}.jsonl\n" for name in ("train", "extra"))
        for split in ("test", "validation"):
            (folder / f"{split}.jsonl").unlink()
        write_jsonl(folder / "extra.jsonl", [row("extra")])
        (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n{names}---\n")
        with pytest.raises(UsageError, match="has the splits train, extra; name one"):
            read(folder)

    def test_one_file_of_several_is_refused(self, folder):
        path = folder / "train-00000-of-00002.parquet"
        pd.DataFrame([row(1)]).to_parquet(path)
        with pytest.raises(UsageError, match=r"is one of 2 files that belong together; give their folder"):
            read(path)
        with pytest.raises(UsageError, match=r"1 of 2 files are missing in .*train-00001-of-00002"):
            read(folder)
        pd.DataFrame([row(2)]).to_parquet(folder / "train-00001-of-00002.parquet")
        assert read(folder).count == 2

    def test_a_saved_data_set_is_read(self, folder):
        rows = [row(i) for i in range(3)]
        datasets.Dataset.from_list(rows).save_to_disk(folder, num_shards=2)
        assert [found for _, found in read(folder).rows] == rows

    def test_a_saved_data_set_of_several_splits_needs_their_names(self, folder):
        parts = {name: datasets.Dataset.from_list([row(name)]) for name in ("train", "test", "more")}
        datasets.DatasetDict(parts).save_to_disk(folder)
        assert [found["prompt"] for _, found in read(f"{folder}:test+more").rows] == ["question test", "question more"]
        with pytest.raises(UsageError, match="has the splits train, test, more; name one"):
            read(folder)
        with pytest.raises(UsageError, match="no such split; its splits: train, test, more"):
            read(f"{folder}:dev")

    def test_a_saved_data_set_with_a_lost_or_a_foreign_file_is_refused(self, folder):
        datasets.Dataset.from_list([row(i) for i in range(3)]).save_to_disk(folder, num_shards=3)
        (folder / "data-00001-of-00003.arrow").rename(folder / "other.arrow")
        with pytest.raises(UsageError, match=r"1 of 3 files are missing"):
            read(folder)
        (folder / "other.arrow").rename(folder / "data-00001-of-00003.arrow")
        write_jsonl(folder / "more.jsonl", [row(9)])
        with pytest.raises(UsageError, match=r"would not be read \(more\.jsonl\)"):
            read(folder)

    def test_a_link_that_leads_nowhere_is_named(self, folder):
        write_jsonl(folder / "part0.jsonl", [row(0)])
        (folder / "part1.jsonl").symlink_to(folder / "lost.jsonl")
        with pytest.raises(UsageError, match=r"would not be read \(part1\.jsonl\)|part1\.jsonl"):
            read(folder)


class TestUnreadColumns:
    def test_columns_that_nothing_reads_are_listed_with_their_rows(self, files):
        rows = [row(i, source="web" if i % 2 else None, score_chosen=3, score_rejected=1) for i in range(10, 14)]
        facts = load_splits(files(train=rows)).facts
        assert facts["unread_columns"] == {"data.train": {"source": 2}}
        assert facts["warnings"] == []

    def test_of_several_columns_that_could_hold_the_prompt_those_that_do_not_are_listed(self, files):
        rows = [row(11, instruction="sort"), row(12, input="x"), row(13)]
        assert load_splits(files(train=rows)).facts["unread_columns"] == {"data.train": {"instruction": 1, "input": 1}}

    def test_answers_without_checks_say_which_key_makes_checks_of_them(self, files):
        spec = files(golden=[{"question": "1 + 1?", "answer": "2"}])
        assert any(
            "data.answer_check=contains, equals or number" in text for text in load_splits(spec).facts["warnings"]
        )
        splits = load_splits(with_changes(spec, answer_check="number"))
        assert splits.golden_prompts[0].checks == ({"number": 2.0},)
        assert splits.facts["warnings"] == []
