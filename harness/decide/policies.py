"""What a study's answers say of its policies: answers of the deciding runs and of the base -> unmoved, or babbling."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from harness.study.collapse import MIN_PROMPTS, runs_to_the_limit
from harness.study.files import FileCache, Reader, strings
from harness.study.manifest import read_manifest


class Answers(NamedTuple):
    """A run's answers to golden, by prompt, and which of them were cut off at the token limit."""

    texts: dict[str, str]
    cut_off: dict[str, bool]

    @property
    def share_cut_off(self) -> float:
        """Share that was cut off, in [0, 1]."""
        return fmean(self.cut_off.values()) if self.cut_off else 0.0


class Policies(NamedTuple):
    """What the answers say, by arm.

    Attributes:
        same_as_base: share of the golden answers that are the base's own, word for word, over all runs.
        at_the_limit: share of the runs most of whose answers run to the token limit, while the base's do not.
    """

    same_as_base: dict[str, float]
    at_the_limit: dict[str, float]


def policies(
    study: Path,
    configs: Mapping[str, str],
    seeds: Mapping[str, Mapping[str, float]],
    files: FileCache | None = None,
) -> Policies:
    """Compare the answers of a study's deciding runs with the base's; empty where it holds none.

    Args:
        study: its folder.
        configs: the deciding config by arm; of an arm that is not here, all configs count.
        seeds: the deciding seeds by arm, as keys; of an arm that is not here, all seeds count.
        files: contents that were read before.
    """
    base = _answers(study / "base", files)
    if len(base.texts) < MIN_PROMPTS:
        return Policies({}, {})
    runs: dict[str, list[Answers]] = {}
    for path in sorted(study.glob("trials/*/manifest.json")):
        run = read_manifest(path.parent, files)
        arm, seed = str(run.get("arm")), str(run.get("seed"))
        if configs.get(arm, run.get("config")) != run.get("config") or seed not in seeds.get(arm, {seed: 0.0}):
            continue
        found = _answers(path.parent, files)
        if found.texts:
            runs.setdefault(arm, []).append(found)
    same = {
        arm: fmean(text == base.texts.get(key) for one in found for key, text in one.texts.items())
        for arm, found in runs.items()
    }
    limit = {
        arm: fmean(runs_to_the_limit(one.share_cut_off, base.share_cut_off) for one in found)
        for arm, found in runs.items()
    }
    return Policies(same, limit)


def _answers(folder: Path, files: FileCache | None) -> Answers:
    rows = Reader(folder, files).rows(folder / "completions.jsonl")
    golden = [row for row in rows if row.get("split") == "golden"]
    return Answers(
        {str(row.get("prompt_id")): str(row.get("completion")) for row in golden},
        {str(row.get("prompt_id")): "cut_off" in strings(row.get("flags")) for row in golden},
    )
