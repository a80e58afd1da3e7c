"""A study that goes wrong, or further than it was registered: what is said, what is kept, what the exit status is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

import harness.generate.heldout
import harness.sweep.stages
import harness.train.base
import harness.train.logps
from harness.config.schema import ModelConfig
from harness.data.inputs import Inputs
from harness.study.errors import UsageError
from harness.study.files import read_json
from harness.sweep.app import print_result, run_sweep
from harness.sweep.protocol import StudyResult
from tests.conftest import SMALL, overriding, tiny_model
from tests.servers import command

pytestmark = pytest.mark.slow


def sweep(results: Path, *arguments: str) -> StudyResult:
    (result,) = run_sweep(overriding(SMALL, "+method=simpo,dpo", f"results_dir={results}", *arguments))
    return result


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A finished study with one seed; tests work on copies."""
    results = tmp_path_factory.mktemp("protocol") / "results"
    sweep(results, "seed=0", "study=small")
    return results / "small"


@pytest.fixture
def study(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "results" / "small"))


def manifests(study: Path) -> dict[str, dict]:
    found = [read_json(path) for path in study.glob("trials/*/manifest.json")]
    return {f"{manifest['arm']} {manifest['config']} {manifest['seed']}": manifest for manifest in found}


def test_another_seed_runs_only_what_is_missing_and_counts_as_another_look(study: Path) -> None:
    result = sweep(study.parent, "seed=0,1", "study=small")
    assert result.launched == 2
    assert result.verdict is not None
    assert result.verdict["n_seeds"] == {"simpo": 2, "dpo": 2}
    assert any("golden was looked at 2 times" in warning for warning in result.verdict["warnings"])
    assert "golden was looked at 2 times" in (study / "report.md").read_text()


def test_a_policy_with_log_probs_that_are_not_finite_diverged(tmp_path: Path, monkeypatch) -> None:
    """Its weights are broken: it is scored as worst and not dropped, as if its loss had been NaN."""
    real = harness.generate.heldout.heldout_rows

    def broken(config, policy, rows, split, **more):
        if config.method.name == "dpo" and split == "golden":
            with torch.no_grad():
                next(iter(policy.parameters())).fill_(float("nan"))
        return real(config, policy, rows, split, **more)

    monkeypatch.setattr(harness.sweep.stages, "heldout_rows", broken)
    pairs = [f"data.{split}={_embedded() / split}.jsonl" for split in ("train", "dev")]
    result = sweep(tmp_path, "seed=0", "study=s", *pairs, f"data.golden={_golden_with_pairs(tmp_path)}")
    assert print_result(result) == 0
    assert result.verdict is not None
    assert result.verdict["means"]["dpo"] == 0.0
    assert any("dpo seed 0 diverged" in warning for warning in result.verdict["warnings"])
    (dpo,) = [manifest for manifest in manifests(tmp_path / "s").values() if manifest["arm"] == "dpo"]
    assert dpo["divergence"] == "the log-probs of 8 of 8 held-out golden pairs are not finite numbers"
    assert sweep(tmp_path, "seed=0", "study=s", *pairs, f"data.golden={tmp_path / 'golden.jsonl'}").launched == 0


def _embedded() -> Path:
    from harness.config.paths import embedded_dir as study_dir

    return study_dir()


def _golden_with_pairs(folder: Path) -> Path:
    import json

    rows = [
        {"prompt": f"Reverse {i}{i + 1}.", "chosen": f"{i + 1}{i}", "rejected": "I do not know"} for i in range(11, 19)
    ]
    (folder / "golden.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "golden.jsonl"


def test_no_file_says_where_this_machine_keeps_the_package(tmp_path: Path, monkeypatch) -> None:
    """Adapters, registrations and W&B files are shared; the embedded study is `embedded` in all of them."""
    monkeypatch.chdir(tmp_path)
    run_sweep(["+method=simpo,dpo", *SMALL[:-1], "results_dir=results", "study=s", "seed=0"])
    registered = yaml.safe_load((tmp_path / "results" / "s" / "study.yaml").read_text())
    assert registered["data"]["golden"]["path"] == "embedded:golden.jsonl"
    assert registered["command"].startswith("python -m harness.sweep +method=simpo,dpo data.max_train_pairs=16 ")
    package = str(Path(harness.sweep.stages.__file__).parent.parent).encode()
    files = [path for path in (tmp_path / "results").rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert [path.name for path in files if package in path.read_bytes()] == []


def test_one_trial_on_a_study_with_another_question_exits_with_2(study: Path, capsys) -> None:
    arguments = ["+method=dpo", "seed=0", *SMALL, f"results_dir={study.parent}", "study=small"]
    assert harness.sweep.app.run_single([*arguments, "decide.margin=0.01"]) == 2
    said = capsys.readouterr().err
    assert "margin: registered 0.05, now 0.01" in said
    assert harness.sweep.app.run_single(arguments) == 0


def test_a_base_that_fails_is_named_with_its_reason_and_exits_with_1(tmp_path: Path, monkeypatch, capsys) -> None:
    def out_of_memory(*_, **__):
        raise MemoryError("cannot allocate the weights")

    monkeypatch.setattr(harness.train.base, "load_base", out_of_memory)
    result = sweep(tmp_path, "seed=0", "study=s")
    assert print_result(result) == 1
    said = capsys.readouterr().out
    assert "failed: sft base seed 0" in said
    assert "preconditions: MemoryError: cannot allocate the weights" in said
    assert "no verdict: the SFT base, which every arm is measured against, could not be scored" in said
    assert "report:" not in said


def test_an_arm_that_fails_before_it_has_a_manifest_keeps_its_reason(tmp_path: Path, monkeypatch, capsys) -> None:
    """The first stage of a trial is loading; an error there leaves failure.json and no manifest."""
    real = Inputs.tokens

    def lost(inputs, config):
        if config.method.name == "dpo":
            raise OSError("the disk is gone")
        return real(inputs, config)

    monkeypatch.setattr(Inputs, "tokens", lost)
    result = sweep(tmp_path, "seed=0", "study=s")
    assert print_result(result) == 1
    said = capsys.readouterr().out
    assert "load: OSError: the disk is gone" in said
    assert "no verdict" in said


def test_a_damaged_manifest_does_not_stop_the_plan(study: Path, capsys) -> None:
    path = next(study.glob("trials/*/manifest.json"))
    path.write_text('{"arm": ')
    run_sweep(["+method=simpo,dpo", *SMALL, f"results_dir={study.parent}", "seed=0", "study=small", "plan=true"])
    said = capsys.readouterr().out
    assert said.count("to run") == 1
    assert said.count("complete") == 1


def test_a_damaged_registration_is_refused_by_name(study: Path) -> None:
    (study / "study.yaml").write_text("{arms: [")
    with pytest.raises(UsageError, match=r"study\.yaml: not readable as YAML"):
        sweep(study.parent, "seed=0", "study=small")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("decide.metric=preference_accuracy", "golden cannot be scored on it; scorers that golden allows: checks"),
        ("decide.guards=[{metric: preference_accuracy, margin: 0.1}]", "decide.guards=preference_accuracy: golden"),
    ],
)
def test_a_metric_that_golden_cannot_give_is_refused_before_anything_is_registered(argument, message, tmp_path) -> None:
    with pytest.raises(UsageError, match=message):
        sweep(tmp_path / "results", "seed=0", argument)
    assert not (tmp_path / "results").exists()


def test_a_template_that_cannot_work_is_refused_before_anything_is_registered(tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages | length }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
    with pytest.raises(UsageError, match="the chat template renders the prompt alone differently"):
        sweep(tmp_path / "results", "seed=0", f"model.chat_template={template}")
    assert not (tmp_path / "results").exists()


def test_seconds_of_an_interrupted_trial_add_up(study: Path) -> None:
    folder = next(study.glob("trials/*"))
    before = read_json(folder / "manifest.json")["seconds"]
    (folder / "completions.jsonl").unlink()
    sweep(study.parent, "seed=0", "study=small")
    after = read_json(folder / "manifest.json")["seconds"]
    assert after["train"] == before["train"]
    assert after["generate"] > before["generate"]


def test_two_sweeps_on_one_study_at_once_lose_nothing(tmp_path: Path) -> None:
    """Each has a seed of its own and both share another; no trial is run twice, and both end with a true study.yaml."""
    given = ["+method=simpo,dpo", *SMALL, f"results_dir={tmp_path}", "study=s"]
    running = [command.start("harness.sweep", *given, seeds) for seeds in ("seed=0,1", "seed=2,1")]
    ended = [sweep.wait() for sweep in running]
    assert [done.returncode for done in ended] == [0, 0], ended
    registered = yaml.safe_load((tmp_path / "s" / "study.yaml").read_text())
    assert {arm: sorted(seeds) for arm, seeds in registered["seeds"].items()} == {"simpo": [0, 1, 2], "dpo": [0, 1, 2]}
    assert len(manifests(tmp_path / "s")) == 6
    again = sweep(tmp_path, "seed=0,1,2", "study=s")
    assert again.launched == 0
    assert again.verdict is not None
    assert again.verdict["n_seeds"] == {"simpo": 3, "dpo": 3}


def test_a_model_that_cannot_be_compared_is_refused_before_any_trial(tmp_path: Path) -> None:
    """Llama 4's text model has no backbone apart, which TRL's own DPO needs; the paired engine runs it otherwise."""
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    embedded = Inputs().checkpoints.folder(ModelConfig())
    model = tmp_path / "model"
    shutil.copytree(embedded, model)
    vocab_size = json.loads((model / "config.json").read_text())["vocab_size"]
    sizes = {"num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 48, "head_dim": 8}
    tiny_model(Llama4TextConfig, Llama4ForCausalLM, vocab_size=vocab_size, pad_token_id=0, **sizes).save_pretrained(
        model
    )
    data = [f"data.{split}={embedded / f'{split}.jsonl'}" for split in ("train", "dev", "golden")]
    about = (f"model.path={model}", *data, "seed=0", "study=refused", "train.engine=stock")
    for _ in range(2):  # the second time, too: a refusal does not turn into a failure that stands
        with pytest.raises(UsageError, match=r"train\.engine=stock: TRL's own trainers .* use train\.engine=paired"):
            sweep(tmp_path / "results", *about)
    assert not list((tmp_path / "results" / "refused").glob("trials/*"))


def test_what_was_proved_stands_in_the_manifests_and_in_the_report(finished: Path) -> None:
    arms = {manifest["arm"]: manifest["preconditions"] for manifest in manifests(finished).values()}
    own = {"dpo": "the loss of DPO", "simpo": "the loss of SimPO"}
    found = [[row for row in rows if row["name"] != own[arm]] for arm, rows in arms.items()]
    assert [len(rows) - len(rest) for rows, rest in zip(arms.values(), found, strict=True)] == [1, 1]
    assert found[0] == found[1]
    assert {row["name"]: row["result"] for row in found[0]} == dict.fromkeys(
        [
            *("parameters are those of the files", "training is deterministic", "the loss is the arm's alone"),
            *("the engine computes what TRL's computes", "date", "end of turn", "token ids", "embedding", "positions"),
        ],
        "proved",
    )
    for page in ("report.html", "report.md"):
        text = (finished / page).read_text()
        assert "Training is deterministic: proved." in text
        assert "DPO's is 0.693147 (log 2)" in text.replace("&#39;", "'").replace("\\", "")
