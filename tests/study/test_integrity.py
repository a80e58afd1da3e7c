"""A file of a trial that was lost or changed takes its stage with it, though its size may be as it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness.study.integrity import done_stages, drop_damaged, fingerprints, resume_stages
from harness.study.manifest import read_manifest


@pytest.fixture
def trial(tmp_path: Path) -> Path:
    """A finished trial's folder, without its training."""
    folder = tmp_path / "s" / "trials" / "t"
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(bytes(1000))
    (folder / "config.yaml").write_text("seed: 1\n")
    (folder / "train.jsonl").write_text('{"step": 1}\n')
    for name in ("completions", "pairs", "scores"):
        (folder / f"{name}.jsonl").write_text('{"row": 1}\n')
    done = ["train", "dev", "golden", "score"]
    (folder / "manifest.json").write_text(json.dumps({"done": done, "files": fingerprints(folder, {})}))
    return folder


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[8] ^= 1  # of `{"row": 1}` the number: it stays JSON, of the same size
    path.write_bytes(bytes(content))


LEFT = {
    "adapter/adapter_model.safetensors": set(),
    "completions.jsonl": {"train"},
    "pairs.jsonl": {"train"},
    "scores.jsonl": {"train", "dev", "golden"},
    "config.yaml": {"train", "dev", "golden"},
    "train.jsonl": set(),
}


@pytest.mark.parametrize("name", LEFT)
def test_a_file_that_was_changed_at_equal_size_takes_its_stage_with_it(name: str, trial: Path) -> None:
    assert done_stages(trial, read_manifest(trial)) == {"train", "dev", "golden", "score"}
    flip(trial / name) if name != "config.yaml" else (trial / name).write_text("seed: 2\n")
    assert done_stages(trial, read_manifest(trial)) == LEFT[name]


def test_weights_that_nobody_reads_again_are_compared_by_size_where_they_are_large(trial: Path) -> None:
    flip(trial / "adapter" / "adapter_model.safetensors")
    manifest = read_manifest(trial)
    assert done_stages(trial, manifest, read_bytes=999) == {"train", "dev", "golden", "score"}
    assert resume_stages(trial, manifest) == []


@pytest.mark.parametrize("damage", [flip, Path.unlink, lambda path: path.write_text("")])
def test_a_damaged_log_of_the_training_is_dropped_and_the_trial_trains_again(damage, trial: Path) -> None:
    damage(trial / "train.jsonl")
    drop_damaged(trial, read_manifest(trial))
    assert not (trial / "train.jsonl").exists()
    assert done_stages(trial, read_manifest(trial)) == set()


@pytest.mark.parametrize("content", [b'{"a": 1}\n\x00\x00\n', b'{"a": 1}\n\xff{}\n', b'{"a": 1', b"[1]\n"])
def test_rows_without_a_known_hash_are_dropped_where_they_cannot_be_read(content: bytes, trial: Path) -> None:
    for name, rows in {"preferences.jsonl": content, "benchmarks.jsonl": b'{"a": 1}\n{"a": 2}\n'}.items():
        (trial / name).write_bytes(rows)
    drop_damaged(trial, read_manifest(trial))
    assert not (trial / "preferences.jsonl").exists()
    assert (trial / "benchmarks.jsonl").exists()
