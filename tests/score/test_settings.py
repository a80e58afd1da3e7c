"""What lies in a results folder is data: it does not say where to send, what to read or which code to run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from harness.config.keys import find_declared
from harness.config.schema import ModelConfig, ScoreConfig
from harness.config.trial_id import plain
from harness.score.__main__ import main
from harness.score.judge_endpoint import LISTED
from harness.score.settings import HARMLESS, SENSITIVE, admit, settings_in
from harness.study.files import read_json, read_jsonl, write_json, write_jsonl
from tests.score.test_judge import longer, tidy
from tests.servers.judge import JudgeServer, judge_server, prefers
from tests.study_fixture import build_study

SECRET = "the-secret-of-a-cloud-account"


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A study from somebody else."""
    folder = build_study(tmp_path / "results" / "letters", prompts=5)
    tidy(folder)
    return folder


@pytest.fixture
def stranger(monkeypatch: pytest.MonkeyPatch) -> Iterator[JudgeServer]:
    """A server that a study names; this user has a cloud's key in the environment."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", LISTED):
        monkeypatch.delenv(name, raising=False)
    with judge_server(prefers(longer)) as server:
        yield server


def names(study: Path, **settings: object) -> None:
    """Let the study's scoring.json say so."""
    write_json(study / "scoring.json", {"settings": settings})


def score(study: Path, *words: str) -> int:
    return main([str(study), *words])


class TestAStudyThatNamesAStrangersServer:
    def test_gets_neither_the_key_nor_an_answer(self, study, stranger, capsys) -> None:
        names(study, judge={"model": "m", "base_url": stranger.url, "api_key_env": "AWS_SECRET_ACCESS_KEY"})
        assert score(study, "judge") == 2
        assert stranger.requests == []
        said = capsys.readouterr().err
        assert f"score.judge.base_url={stranger.url}" in said
        assert "api_key_env=AWS_SECRET_ACCESS_KEY: not a judge's key" in said
        assert "trust_study=true" in said
        assert SECRET not in said
        assert not (study / "judge.json").exists()

    def test_gets_no_answer_without_a_key_either(self, study, stranger, capsys) -> None:
        names(study, judge={"model": "m", "base_url": stranger.url})
        assert score(study, "judge") == 2
        assert stranger.requests == []
        assert f"add: score.judge.base_url={stranger.url}" in capsys.readouterr().err

    def test_is_the_same_where_a_trials_config_says_so(self, study, stranger) -> None:
        trial = next((study / "trials").iterdir())
        config = {"score": {"judge": {"model": "m", "base_url": stranger.url}}}
        (trial / "config.yaml").write_text(yaml.safe_dump(config))
        assert score(study, "judge") == 2
        assert stranger.requests == []

    def test_asks_it_where_this_user_types_the_address(self, study, stranger) -> None:
        names(study, judge={"model": "m", "base_url": "http://127.0.0.1:9/v1", "max_tokens": 7})
        assert score(study, "judge", f"score.judge.base_url={stranger.url}") == 0
        assert {(request["model"], request["max_tokens"]) for request in stranger.requests} == {("m", 7)}
        assert set(stranger.keys) == {"none"}

    def test_asks_it_where_this_user_trusts_the_study_and_says_what_it_uses_before(
        self, study, stranger, capsys, monkeypatch
    ) -> None:
        monkeypatch.setenv("MY_JUDGE_KEY", "for-judges")
        names(study, judge={"model": "m", "base_url": stranger.url, "api_key_env": "MY_JUDGE_KEY"})
        assert score(study, "judge", "trust_study=true") == 0
        assert set(stranger.keys) == {"for-judges"}
        said = capsys.readouterr().err
        assert said.index(f"score.judge.base_url={stranger.url}  (address") < said.index("judge m: ")
        assert said.index("score.judge.api_key_env=MY_JUDGE_KEY  (environment variable") < said.index("judge m: ")

    def test_gets_no_other_secret_even_where_it_is_trusted(self, study, stranger) -> None:
        names(study, judge={"model": "m", "base_url": stranger.url, "api_key_env": "AWS_SECRET_ACCESS_KEY"})
        assert score(study, "judge", "trust_study=true") == 2
        assert stranger.requests == []


class TestAKeysVariable:
    def test_is_a_judges_also_where_this_user_types_it(self, study, stranger, capsys) -> None:
        typed = ["score.judge.model=m", f"score.judge.base_url={stranger.url}"]
        assert score(study, "judge", *typed, "score.judge.api_key_env=AWS_SECRET_ACCESS_KEY") == 2
        assert stranger.requests == []
        assert f"or one that the environment variable {LISTED} lists" in capsys.readouterr().err

    @pytest.mark.parametrize("name", ["OPENAI_API_KEY", "A_JUDGE_KEY", "LISTED_BY_ME"])
    def test_may_be_openais_one_of_a_judge_or_one_that_this_user_lists(
        self, name, study, stranger, monkeypatch
    ) -> None:
        monkeypatch.setenv(LISTED, "OTHER, LISTED_BY_ME")
        monkeypatch.setenv(name, "for-judges")
        typed = ["score.judge.model=m", f"score.judge.base_url={stranger.url}", f"score.judge.api_key_env={name}"]
        assert score(study, "judge", *typed) == 0
        assert set(stranger.keys) == {"for-judges"}


class TestAStudyThatNamesAFile:
    """None is read: each of these files exists and would be of use."""

    def test_template(self, study, stranger, tmp_path, capsys) -> None:
        self.refused(study, capsys, stranger, template=self.file(tmp_path))

    def test_template_without_a_folder_in_its_name(self, study, stranger, tmp_path, capsys, monkeypatch) -> None:
        monkeypatch.chdir(self.file(tmp_path).parent)
        self.refused(study, capsys, stranger, template=Path("private.jsonl"))

    def test_baseline(self, study, stranger, tmp_path, capsys) -> None:
        rows = [{"prompt_id": r["prompt_id"], "completion": "private"} for r in read_jsonl(study / "prompts.jsonl")]
        write_jsonl(tmp_path / "private.jsonl", rows)
        names(study, baseline=str(tmp_path / "private.jsonl"))
        self.typed_judge(study, stranger, capsys, "score.baseline")

    def test_calibration_pairs(self, study, stranger, tmp_path, capsys) -> None:
        write_jsonl(tmp_path / "private.jsonl", [{"prompt": "q", "chosen": "private", "rejected": "x"}])
        names(study, calibration_pairs=str(tmp_path / "private.jsonl"))
        self.typed_judge(study, stranger, capsys, "score.calibration_pairs")

    @pytest.mark.parametrize("path", ["somebody/else", "./a/folder"])
    def test_reward_model(self, path, study, capsys, monkeypatch) -> None:
        monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
        names(study, reward_model={"path": path, "revision": "v2"})
        assert score(study, "reward_model") == 2
        assert f"add: score.reward_model.path={path} score.reward_model.revision=v2" in capsys.readouterr().err

    def test_folder_of_benchmark_tasks(self, study, tmp_path, capsys) -> None:
        base_of(study, path="embedded")
        names(study, lm_eval={"tasks": ["mini"], "include_path": str(tmp_path)})
        assert score(study, "lm_eval") == 2
        assert "score.lm_eval.include_path" in capsys.readouterr().err

    def test_file_of_benchmark_tasks(self, study, capsys) -> None:
        base_of(study, path="embedded")
        names(study, lm_eval={"tasks": ["./evil.yaml"]})
        assert score(study, "lm_eval") == 2
        assert "score.lm_eval.tasks" in capsys.readouterr().err

    def test_length_control(self, study, stranger, tmp_path, capsys) -> None:
        typed = ["score.judge.model=m", f"score.judge.base_url={stranger.url}"]
        names(study, length_control={"difficulty": str(self.file(tmp_path))})
        assert score(study, "judge", "length_controlled", *typed) == 2
        assert stranger.requests == []
        assert "score.length_control.difficulty" in capsys.readouterr().err

    @pytest.mark.parametrize("key", ["path", "revision", "chat_template"])
    def test_base_model(self, key, study, capsys, monkeypatch) -> None:
        monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
        base_of(study, **({"path": "embedded"} | {key: "somebody/else"}))
        assert score(study, "lm_eval", "score.lm_eval.tasks=[gsm8k]") == 2
        assert f"model.{key}=somebody/else" in capsys.readouterr().err

    def test_scorer_is_not_run_whoever_trusts_the_study(self, study, stranger, tmp_path) -> None:
        ran = tmp_path / "ran"
        (tmp_path / "evil.py").write_text(f"open({str(ran)!r}, 'w')\ndef score(outputs): return []")
        names(study, scorers=[str(tmp_path / "evil.py")])
        typed = ["score.judge.model=m", f"score.judge.base_url={stranger.url}"]
        assert score(study, "judge", *typed, "trust_study=true") == 0
        assert not ran.exists()

    def test_by_a_link(self, study, stranger, tmp_path, capsys) -> None:
        answers = next((study / "trials").iterdir()) / "completions.jsonl"
        answers.rename(tmp_path / "private.jsonl")
        answers.symlink_to(tmp_path / "private.jsonl")
        self.typed_judge(study, stranger, capsys, f"{answers} -> {tmp_path / 'private.jsonl'}")

    def file(self, folder: Path) -> Path:
        write_jsonl(folder / "private.jsonl", [])
        return folder / "private.jsonl"

    def refused(self, study, capsys, stranger, template: Path) -> None:
        names(study, judge={"template": str(template)})
        self.typed_judge(study, stranger, capsys, f"score.judge.template={template}")

    def typed_judge(self, study, stranger, capsys, said: str) -> None:
        typed = ["score.judge.model=m", f"score.judge.base_url={stranger.url}"]
        assert score(study, "judge", *typed) == 2
        assert stranger.requests == []
        assert said in capsys.readouterr().err


def unreachable(*given: object) -> None:
    raise AssertionError("nothing is read before it is typed or trusted")


def base_of(study: Path, **model: str) -> None:
    (study / "base" / "config.yaml").write_text(yaml.safe_dump({"model": model}))


class TestOnesOwnStudy:
    def test_is_scored_by_what_was_stored_whatever_else_it_names(self, study) -> None:
        names(study, baseline="gone.json", judge={"base_url": "http://x"}, scorers=["mine.py"])
        assert score(study) == 0
        assert score(study, "checks") == 0

    def test_keeps_what_is_harmless_and_what_one_typed_once_is_in_the_message_of_the_next(
        self, study, stranger, capsys
    ) -> None:
        typed = ["score.judge.model=m", f"score.judge.base_url={stranger.url}", "score.judge.template=arenahard"]
        score(study, "judge", *typed, "score.judge.temperature=0.5")
        asked = len(stranger.requests)
        assert score(study, "judge") == 2
        (paste,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("allowed: ")]
        words = paste.partition("add: ")[2].split()
        assert words == [f"score.judge.base_url={stranger.url}"]
        score(study, "judge", *words)
        assert {request["temperature"] for request in stranger.requests[asked:]} <= {0.5}

    def test_loses_nothing_of_its_settings_where_others_score_it(self, study, stranger) -> None:
        names(study, baseline="b.json", reward_model={"path": "a/b"}, labeller="gpt-4")
        assert (
            score(study, "judge", "score.judge.model=m", "score.baseline=null", f"score.judge.base_url={stranger.url}")
            == 0
        )
        kept = read_json(study / "scoring.json")["settings"]
        assert kept["reward_model"] == {"path": "a/b"}
        assert kept["baseline"] is None
        assert kept["labeller"] == "gpt-4"

    def test_may_hold_a_key_that_no_longer_exists(self, study, stranger, capsys) -> None:
        names(study, judge={"model": "m"}, head_to_head=True)
        assert score(study, "judge", f"score.judge.base_url={stranger.url}") == 0
        assert "head_to_head" not in capsys.readouterr().err
        assert "head_to_head" not in read_json(study / "scoring.json")["settings"]


class TestAValueOutOfAStudy:
    @pytest.mark.parametrize(
        ("settings", "said"),
        [
            ({"judge": {"model": "${oc.env:AWS_SECRET_ACCESS_KEY}"}}, "holds an interpolation"),
            ({"labeller": "${oc.env:AWS_SECRET_ACCESS_KEY}"}, "holds an interpolation"),
            ({"judge": {"concurrency": 100000}}, "score.judge.concurrency=100000: out of range"),
            ({"judge": {"max_tokens": float("nan")}}, "score.judge.max_tokens=nan: must be a whole number"),
            ({"judge": {"proxy": "http://x"}}, "score.judge.proxy: no setting that is taken from a results folder"),
            ({"judge": "x"}, "score.judge: no setting that is taken from a results folder"),
            ({"judge": {"base_url": ["http://x"]}}, "must be a text"),
        ],
    )
    def test_has_the_limits_of_a_typed_one_and_fills_in_nothing(self, settings, said, study, stranger, capsys) -> None:
        (study / "scoring.json").write_text(json.dumps({"settings": settings}))  # NaN and all
        model = [] if "model" in settings.get("judge", {}) else ["score.judge.model=m"]
        typed = [] if "base_url" in settings.get("judge", {}) else [f"score.judge.base_url={stranger.url}"]
        assert score(study, "judge", *model, *typed) == 2
        assert stranger.requests == []
        error = capsys.readouterr().err
        assert said in error
        assert SECRET not in error

    def test_is_shown_in_one_visible_line_quoted_for_the_shell(self, study, stranger, capsys) -> None:
        names(study, judge={"model": "m", "base_url": "http://x/v1; rm -rf ~\n\x1b[2J"})
        assert score(study, "judge") == 2
        error = capsys.readouterr().err
        assert "add: 'score.judge.base_url=http://x/v1; rm -rf ~ \\x1b[2J'" in error
        assert "\x1b" not in error

    def test_of_trust_is_true_or_false_and_typed(self, study, stranger, capsys) -> None:
        names(study, trust_study=True, judge={"model": "m", "base_url": stranger.url})
        assert score(study, "judge") == 2
        assert score(study, "judge", "trust_study=yes") == 2
        assert "trust_study=yes: allowed: trust_study=true, trust_study=false" in capsys.readouterr().err
        assert stranger.requests == []


def keys_of(owner: object, prefix: str) -> set[str]:
    found = set()
    for field in dataclasses.fields(owner):  # type: ignore[arg-type]
        value, key = getattr(owner, field.name), f"{prefix}.{field.name}"
        found |= keys_of(value, key) if dataclasses.is_dataclass(value) else {key}
    return found


def test_every_key_is_either_harmless_or_sensitive() -> None:
    """Whoever adds a key decides whether a study from somebody else may set it."""
    keys = keys_of(ScoreConfig(), "score") | keys_of(ModelConfig(), "model") | {"train.tuning"}
    assert not HARMLESS & set(SENSITIVE)
    assert HARMLESS | set(SENSITIVE) == keys
    assert all(declared is not None for key in keys for declared, *_ in find_declared(key, []))


def test_whoever_names_an_address_a_path_or_a_variable_is_sensitive() -> None:
    words = ("url", "path", "env", "file", "folder", "template", "baseline", "pairs", "revision", "difficulty", "gamed")
    is_switch = {"score.lm_eval.chat_template"}
    assert [key for key in HARMLESS - is_switch if any(word in key.rpartition(".")[2] for word in words)] == []


def test_what_a_sweep_writes_of_settings_that_nobody_changed_is_no_reason_to_refuse() -> None:
    sections = {"score": plain(ScoreConfig()), "model": plain(ModelConfig())}
    found = [one for name, values in sections.items() for one in settings_in(values, name, Path("config.yaml"))]
    every = ["judge", "reward_model", "length_controlled", "lm_eval"]
    admitted, trusted = admit(found, typed=(), scorers=every, is_trusted=False)
    assert set(admitted) == {one.key for one in found} - {"score.scorers"}
    assert trusted == []
