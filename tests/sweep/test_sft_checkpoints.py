"""A study on an SFT adapter: base, both arms and reference are the one merged model; a broken one stops with status 2."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import yaml

from harness.config.checkpoint import Checkpoints
from harness.config.compose import config_from
from harness.config.paths import embedded_dir
from harness.config.schema import ModelConfig
from harness.data.inputs import Inputs
from harness.study.errors import UsageError
from harness.study.files import read_json, read_jsonl
from harness.sweep.app import run_single, run_sweep
from harness.train.derived import derive
from tests.conftest import SMALL, overriding
from tests.servers import command
from tests.train.sft_folders import rewrite, save_adapter, save_base

pytestmark = pytest.mark.slow

DATA = [f"data.{split}={embedded_dir()}/{split}.jsonl" for split in ("train", "dev", "golden")]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter on a Granite of two layers, in a folder without a tokenizer."""
    from transformers import GraniteConfig, GraniteForCausalLM

    place = tmp_path_factory.mktemp("sft")
    return save_adapter(save_base(place / "base", GraniteConfig, GraniteForCausalLM), place / "sft")


def overrides(model: Path, results: Path, *more: str) -> list[str]:
    """Return the command line of a small study of one seed."""
    given = [f"model.path={model}", f"results_dir={results}", "study=s", "seed=1", "train.epochs=1", *DATA, *more]
    return overriding([*SMALL, "train.lora_rank=4"], "+method=simpo,dpo", *given)


@pytest.fixture(scope="module")
def study(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study on it."""
    results = tmp_path_factory.mktemp("results")
    (result,) = run_sweep(overrides(adapter, results))
    assert result.verdict is not None
    return results / "s"


def test_two_workers_at_once_train_on_the_one_merged_model(study: Path, adapter: Path, tmp_path: Path) -> None:
    done = command.run("harness.sweep", *overrides(adapter, tmp_path, "hydra/launcher=joblib"))
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    (merged,) = [path for path in (tmp_path / ".cache" / "merged").iterdir() if path.is_dir()]
    (once,) = [path for path in (study.parent / ".cache" / "merged").iterdir() if path.is_dir()]
    assert merged.name == once.name
    assert (merged / "model.safetensors").read_bytes() == (once / "model.safetensors").read_bytes()
    hashes = [
        {read_json(path)["base_sha256"] for path in one.rglob("manifest.json")} for one in (study, tmp_path / "s")
    ]
    assert hashes[0] == hashes[1]
    assert (tmp_path / "s" / "scores.csv").read_text() == (study / "scores.csv").read_text()


def test_policy_and_reference_start_as_one_model(study: Path) -> None:
    losses = {
        manifest["arm"]: next(read_jsonl(path.parent / "train.jsonl"))["loss"]
        for path in study.glob("trials/*/manifest.json")
        for manifest in [read_json(path)]
    }
    assert losses.keys() == {"dpo", "simpo"}
    assert losses["dpo"] == pytest.approx(math.log(2), abs=1e-5)


def test_all_trials_have_the_hash_of_base_and_adapter(study: Path, adapter: Path) -> None:
    registered = yaml.safe_load((study / "study.yaml").read_text())["model"]
    found = {read_json(path)["base_sha256"] for path in study.rglob("manifest.json")}
    assert found == {registered["base_sha256"]}
    made = registered["made_of"]
    assert (made["kind"], made["base"], made["adapter"]) == ("merged", str(adapter.parent / "base"), str(adapter))
    assert made["base_sha256"] not in found


def test_the_bases_log_probs_are_those_of_peft(study: Path, adapter: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from harness.train.logps import pair_logps

    config = config_from(yaml.safe_load((study / "base" / "config.yaml").read_text()))
    tokens = Inputs(Checkpoints(derive)).tokens(config)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(adapter.parent / "base"), adapter)
    wanted = pair_logps(model.eval(), tokens.dev.rows, pad_id=tokens.chat.tokenizer.pad_token_id, desc="PEFT")
    rows = [row for row in read_jsonl(study / "base" / "pairs.jsonl") if row["split"] == "dev"]
    assert [row["chosen_sum_logps"] for row in rows] == pytest.approx(wanted[:, 0].tolist(), abs=1e-3)


def test_a_trained_arm_names_the_merged_model_as_its_base(study: Path, adapter: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    for folder in study.glob("trials/*/adapter"):
        named = Path(read_json(folder / "adapter_config.json")["base_model_name_or_path"])
        assert named == Checkpoints().folder(ModelConfig(str(adapter)), str(study.parent))
        AutoPeftModelForCausalLM.from_pretrained(folder)


def test_the_plan_says_what_the_models_are(study: Path, adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_sweep(overrides(adapter, study.parent, "plan=true"))
    said = capsys.readouterr().out
    base = adapter.parent / "base"
    assert f"model: base, arms and reference are the adapter {adapter} merged into {base}: " in said
    assert "complete" in said
    assert "chat template" not in said


def test_a_trained_arm_is_an_sft_checkpoint_itself(study: Path, tmp_path: Path) -> None:
    """A second round starts from the first one's adapter."""
    first = next(study.glob("trials/*/adapter"))
    results = tmp_path / "results"
    arguments = [word for word in overrides(first, results) if not word.startswith("+method")]
    assert run_single([*arguments, "+method=dpo"]) == 0
    (row, *_) = read_jsonl(next(results.glob("s/trials/*/train.jsonl")))
    assert row["loss"] == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.parametrize("plan", [True, False])
def test_weights_under_other_names_are_refused_before_anything_is_made(
    plan: bool, adapter: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(adapter.parent / "base", tmp_path / "base")
    rewrite(base, lambda found: {f"transformer.{name}": tensor for name, tensor in found.items()})
    results = tmp_path / "results"
    with pytest.raises(UsageError, match=r"model.path=.*base: .* would be random; .*`transformer.` in front"):
        run_sweep(overrides(base, results, f"plan={plan}"))
    assert not results.exists()


def test_a_base_without_a_chat_template_is_said_in_the_plan(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = shutil.copytree(adapter.parent / "base", tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    run_sweep(overrides(base, tmp_path / "results", "plan=true"))
    assert f"warning: model.path={base}: its tokenizer has no chat template" in capsys.readouterr().out
