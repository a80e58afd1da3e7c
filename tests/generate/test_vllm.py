"""All adapters of a study in one vLLM pass.

vLLM needs a GPU, so the tests put a package of its name on the path that answers with transformers and PEFT: what is
asked of it, by which adapter, and what becomes of its answers is real; its own engine is not run here.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import weakref
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import harness.config.compose
import harness.sweep.problems
from harness.config.compose import vllm_problem
from harness.config.paths import embedded_dir
from harness.config.schema import RunConfig
from harness.config.trial_id import trial_id
from harness.generate.vllm import memory_share
from harness.study.errors import UsageError
from harness.study.files import read_json
from harness.sweep.app import run_sweep
from harness.sweep.problems import load_run
from harness.train.base import Bases
from tests.conftest import SMALL, overriding
from tests.train.sft_folders import save_base

STAND_IN = """
import json, os, time, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from types import SimpleNamespace as Record

SamplingParams = Record

class LLM:
    def __init__(self, **keys):
        self.keys = keys
        self.base = lambda: AutoModelForCausalLM.from_pretrained(keys["model"], dtype=keys["dtype"])

    def generate(self, prompts, sampling, lora_request):
        with open(os.environ["STAND_IN_LOG"], "a") as log:
            log.write(json.dumps({**self.keys, "at": time.time(), "adapters": [r and r.path for r in lora_request]}) + "\\n")
        if os.environ.get("STAND_IN_FAILS"):
            raise RuntimeError("CUDA out of memory")
        models, outputs = {}, []
        for prompt, request in zip(prompts, lora_request, strict=True):
            path = request and request.path
            if path not in models:
                models[path] = PeftModel.from_pretrained(self.base(), path) if path else self.base()
            ids = torch.tensor([prompt["prompt_token_ids"]])
            answer = models[path].generate(input_ids=ids, do_sample=False, max_new_tokens=sampling.max_tokens,
                                           eos_token_id=sampling.stop_token_ids)[0, ids.shape[1]:].tolist()
            outputs.append(Record(outputs=[Record(token_ids=answer)]))
        return outputs
"""
REQUEST = """
class LoRARequest:
    def __init__(self, lora_name, lora_int_id, lora_path):
        assert lora_int_id > 0
        self.path = lora_path
"""


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory):
    """Put the stand-in on the path of child processes."""
    folder = tmp_path_factory.mktemp("path")
    (folder / "vllm" / "lora").mkdir(parents=True)
    (folder / "vllm" / "__init__.py").write_text(STAND_IN)
    (folder / "vllm" / "lora" / "__init__.py").write_text("")
    (folder / "vllm" / "lora" / "request.py").write_text(REQUEST)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))
        patch.setenv("STAND_IN_LOG", str(folder / "log"))
        yield folder / "log"


def sweep(folder: Path, backend: str, *more: str) -> Any:
    keys = ["+method=simpo,dpo", "seed=0,1", "study=one", f"results_dir={folder}", f"generate.backend={backend}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness.generate.vllm, "vllm_problem", lambda config: None)  # let configs ask for the stand-in
        (result,) = run_sweep(overriding(SMALL, *keys, *more))
    return result


@pytest.fixture(scope="module")
def by_vllm(log: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vllm")
    sweep(folder, "vllm")
    return folder / "one"


def test_all_adapters_are_answered_for_in_one_pass_with_the_same_scores(
    tmp_path: Path, log: Path, by_vllm: Path
) -> None:
    sweep(tmp_path, "transformers")
    calls = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(calls) == 2, "one for the base, one for all trials"
    assert set(calls[0]["adapters"]) == {None}
    trials = {str(path / "adapter") for path in (by_vllm / "trials").iterdir()}
    assert set(calls[1]["adapters"]) == trials
    assert len(trials) == 4
    assert calls[1]["enable_lora"]
    assert calls[1]["max_lora_rank"] == 16
    assert calls[1]["generation_config"] == "vllm"
    columns = ["arm", "config", "seed", "split", "prompt_id", "scorer", "score"]
    first, second = (
        pd.read_csv(folder / "scores.csv")[columns].sort_values(columns, ignore_index=True)
        for folder in (by_vllm, tmp_path / "one")
    )
    pd.testing.assert_frame_equal(first, second, rtol=1e-4)
    assert not list(by_vllm.rglob("answers-*")) + list(by_vllm.glob("vllm-*")), "what was exchanged is cleared away"


def test_the_model_and_all_arms_are_proved_before_the_base_answers(log: Path, by_vllm: Path) -> None:
    first = json.loads(log.read_text().splitlines()[0])
    (proof,) = (by_vllm.parent / ".cache" / "preconditions").iterdir()
    assert [path.name for path in proof.glob("*.json")] == ["proof.json"], "which has both arms, as they are by default"
    assert (proof / "proof.json").stat().st_mtime < first["at"]
    names = {row["name"] for row in read_json(by_vllm / "base" / "manifest.json")["preconditions"]}
    assert {"the loss is the arm's alone", "the loss of DPO", "the loss of SimPO"} <= names


@pytest.mark.parametrize("backend", ["vllm", "transformers"])
def test_a_model_that_is_refused_never_answers(backend: str, tmp_path: Path, log: Path) -> None:
    """An encoder that transformers loads as a language model."""
    from transformers import BertConfig, BertLMHeadModel

    model = save_base(tmp_path / "encoder", BertConfig, BertLMHeadModel)
    data = [f"data.{split}={embedded_dir()}/{split}.jsonl" for split in ("train", "dev", "golden")]
    before = log.read_text() if log.is_file() else ""
    with pytest.raises(UsageError, match="lets tokens see later ones"):
        sweep(tmp_path / "results", backend, f"model.path={model}", "train.lora_rank=4", *data)
    assert (log.read_text() if log.is_file() else "") == before
    assert not list((tmp_path / "results").rglob("answers-*"))
    assert not list((tmp_path / "results").rglob("completions.jsonl"))
    assert not list((tmp_path / "results" / "one" / "trials").glob("*"))


def test_answers_are_asked_for_once_and_a_vllm_that_fails_fails_the_trials_and_keeps_what_was_trained(
    log: Path, by_vllm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = len(log.read_text().splitlines())
    assert sweep(by_vllm.parent, "vllm").launched == 0
    assert len(log.read_text().splitlines()) == asked
    for path in (by_vllm / "trials").iterdir():
        (path / "completions.jsonl").unlink()
    monkeypatch.setenv("STAND_IN_FAILS", "1")
    messages = [outcome.message for outcome in sweep(by_vllm.parent, "vllm").outcomes if outcome.status == "failed"]
    assert len(messages) == 4
    assert all("CUDA out of memory" in text and "generate.backend=transformers" in text for text in messages)
    assert all("train" in read_json(path / "manifest.json")["done"] for path in (by_vllm / "trials").iterdir())


def test_vllm_takes_its_share_of_what_is_free() -> None:
    assert memory_share(0, 0) is None, "without a GPU it is vLLM's own business"
    assert memory_share(40 * 2**30, 80 * 2**30) == 0.45


@pytest.fixture
def bases_alive(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of bases in memory each time that vLLM starts."""
    seen: list[Any] = []
    alive: list[int] = []
    lend, run = Bases.borrow_base, harness.generate.vllm.run_vllm

    @contextlib.contextmanager
    def noted(self: Bases, config: RunConfig, **how: bool) -> Any:
        with lend(self, config, **how) as base:
            seen.append(weakref.ref(base))
            yield base

    def count(*args: Any) -> Any:
        assert seen
        alive.append(sum(ref() is not None for ref in seen))
        return run(*args)

    monkeypatch.setattr(Bases, "borrow_base", noted)
    monkeypatch.setattr(harness.generate.vllm, "run_vllm", count)
    return alive


def test_vllm_runs_in_an_interpreter_of_its_own_and_with_the_card_to_itself(
    tmp_path: Path, log: Path, bases_alive: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It refuses a card of which another process holds a part, and pins a version of torch."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$0 $1" >> {tmp_path}/asked\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(harness.generate.vllm, "memory_share", lambda free, total: 0.5)
    monkeypatch.setattr(harness.generate.vllm, "vllm_problem", lambda config: None)
    keys = ["+method=simpo", "seed=0", "study=one", f"results_dir={tmp_path}", "generate.backend=vllm"]
    (result,) = run_sweep([*SMALL, *keys, f"generate.vllm_python={python}"])
    assert [outcome.status for outcome in result.outcomes] == ["complete", "complete"]
    assert bases_alive == [0, 0]
    asked = (tmp_path / "asked").read_text().split()
    assert set(asked[::2]) == {str(python)}
    assert all(script.endswith("vllm_process.py") for script in asked[1::2])
    assert json.loads(log.read_text().splitlines()[-1])["gpu_memory_utilization"] == 0.5
    process = (Path(harness.generate.vllm.__file__).parent / "vllm_process.py").read_text()
    assert "from harness" not in process.split("TYPE_CHECKING:")[0], "an interpreter with vLLM need not have it"


def test_the_interpreter_of_vllm_is_no_part_of_a_trials_id() -> None:
    plain, own = load_run(["+method=dpo"]), load_run(["+method=dpo", f"generate.vllm_python={sys.executable}"])
    assert trial_id(plain, {}) == trial_id(own, {})


def test_an_interpreter_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_run(["+method=dpo", "generate.vllm_python=/no/python"])
    config.model.path = "own"
    assert vllm_problem(config) == (
        "generate.vllm_python=/no/python is no program; give the path of the interpreter that has vLLM"
    )


def test_without_vllm_transformers_answers() -> None:
    assert load_run(["+method=dpo"]).generate.backend == "transformers"


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ([], "too small for vLLM"),
        (["train.tuning=full"], "train.tuning=full makes no adapters"),
    ],
)
def test_vllm_is_refused_where_it_cannot_answer(keys: list[str], words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        load_run(["+method=dpo", "generate.backend=vllm", *keys])
    assert "generate.backend=transformers" in str(caught.value)


def test_vllm_needs_a_gpu_and_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_run(["+method=dpo"])
    config.model.path = "own"
    assert "not installed" in str(vllm_problem(config))
    monkeypatch.setattr(harness.config.compose, "find_spec", lambda name: object())
    monkeypatch.setattr(Path, "exists", lambda self: False)
    assert vllm_problem(config) == "no GPU is there"
