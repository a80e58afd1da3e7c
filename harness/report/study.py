"""One study: its folder, in whatever state a sweep left it -> one object to read from.

Half-finished, failed and broken trials are part of it. Writes nothing, imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypedDict

import pandas as pd

from harness.config.arms import BASE
from harness.decide.looks import DecidingRuns, deciding_runs
from harness.decide.scores_file import ArmScores, arm_scores, as_names
from harness.study.errors import UsageError
from harness.study.files import FileCache, Json, Reader, mapping, strings
from harness.study.manifest import is_as_written
from harness.study.scores_csv import SCORE_COLUMNS, read_scores_csv

_MARKERS = ("study.yaml", "trials", "scores.csv", "verdict.json")
_NUMERIC = ("seed", "score", "tokens", "chars")
COMPLETE, DIVERGED, FAILED, UNFINISHED = "complete", "diverged", "failed", "unfinished"
_STATES = {"complete": COMPLETE, "diverged": DIVERGED}


class Completion(TypedDict):
    """A row of completions.jsonl, complete whatever a broken or foreign file holds; `tokens` may be missing.

    Attributes:
        thinking_tokens: None where the policy did not think.
    """

    split: str
    prompt_id: str
    prompt: str
    completion: str
    tokens: int | None
    thinking_tokens: int | None
    flags: list[str]


@dataclass(frozen=True)
class Trial:
    """One training run (or the base), finished or not.

    Attributes:
        state: `complete`, `diverged`, `failed` or `unfinished`.
        manifest, failure: contents of manifest.json and failure.json; empty where there is no such file.
        steps: rows of train.jsonl, one per logged step.
        completions: rows of completions.jsonl.
    """

    trial_id: str
    arm: str
    config: str
    seed: int | None
    state: str
    manifest: Mapping[str, Json]
    failure: Mapping[str, Json]
    steps: tuple[Mapping[str, Json], ...]
    completions: tuple[Completion, ...]

    @cached_property
    def curve(self) -> pd.DataFrame:
        """The steps as a frame of numbers; built on demand, since a report draws few of hundreds of trials."""
        return pd.DataFrame(list(self.steps)).apply(pd.to_numeric, errors="coerce")

    @property
    def scored(self) -> bool:
        """Whether its scores count; those of a diverged trial do."""
        return self.state in (COMPLETE, DIVERGED)


@dataclass(frozen=True)
class Config:
    """An arm with its hyperparameters, seed left out, and its trials in the order of their seeds."""

    arm: str
    label: str
    trials: tuple[Trial, ...]


@dataclass(frozen=True)
class Study:
    """The contents of a study's folder.

    Attributes:
        settings: study.yaml; empty where there is none.
        scores: scores.csv, or the trials' scores.jsonl while there is none.
        verdict: verdict.json; empty before the decision.
        problems: what could not be read, one sentence each.
        selection: selection.json; empty where nothing was tuned, or nothing is selected yet.
        files: cache of the files, for parts of the report that read more of them.
    """

    folder: Path
    settings: Mapping[str, Json]
    base: Trial | None
    trials: tuple[Trial, ...]
    scores: pd.DataFrame
    verdict: Mapping[str, Json]
    problems: tuple[str, ...]
    selection: Mapping[str, Json] = field(default_factory=dict)
    files: FileCache = field(default_factory=FileCache)

    @property
    def name(self) -> str:
        """The study's name, or its folder's."""
        return str(self.settings.get("study") or self.folder.name)

    @cached_property
    def arms(self) -> tuple[str, ...]:
        """Arms in the order of the verdict, then of study.yaml, then of their appearance."""
        listed = [*strings(self.verdict.get("arms")), *strings(self.settings.get("arms"))]
        seen = [*(trial.arm for trial in self.trials), *self.scores["arm"].unique()]
        return tuple(dict.fromkeys(arm for arm in [*listed, *seen] if arm and arm != BASE))

    @property
    def metric(self) -> str:
        """The scorer that decides; the first in the scores where none is registered."""
        first = next(iter(self.scores["scorer"].unique()), "")
        return str(self.verdict.get("metric") or self.settings.get("metric") or first)

    @cached_property
    def split(self) -> str:
        """The split that is shown: `golden`, or `dev` while there is nothing on golden."""
        rows = list(self.scores["split"].unique()) + [c["split"] for t in self.trials for c in t.completions[:1]]
        return "dev" if "dev" in rows and "golden" not in rows else "golden"

    @cached_property
    def confirmed(self) -> pd.DataFrame:
        """Scores of the shown split: those of the confirm stage where there are any."""
        rows = self.scores[self.scores["split"] == self.split]
        confirm = rows[rows["stage"] == "confirm"]
        return confirm if len(confirm) else rows

    @cached_property
    def configs(self) -> tuple[Config, ...]:
        """The configs that stand for their arms: those with confirmed scores, or all while there are none.

        Scores without trials (of another program) give configs without trials.
        """
        rows = self.confirmed[self.confirmed["arm"] != BASE]
        runs = set(rows[["arm", "config", "seed"]].drop_duplicates().itertuples(index=False, name=None))
        scored = [trial for trial in self.trials if trial.scored]
        shown = [t for t in scored if (t.arm, t.config, t.seed) in runs] or scored
        names = {(t.arm, t.config) for t in shown} if self.trials else {(arm, config) for arm, config, _ in runs}
        ordered = sorted((n for n in names if n[0] in self.arms), key=self._rank)
        by_seed = sorted(shown, key=lambda trial: (trial.seed is None, trial.seed or 0))
        return tuple(Config(a, c, tuple(t for t in by_seed if (t.arm, t.config) == (a, c))) for a, c in ordered)

    def _rank(self, name: tuple[str, str]) -> tuple[int, bool, str]:
        """Order (arm, config) by arm; the config that the verdict was made on comes before the arm's others."""
        arm, config = name
        return self.arms.index(arm), config != mapping(self.verdict.get("configs")).get(arm), config

    @property
    def with_base(self) -> tuple[Config, ...]:
        """The base, where there is one, and then the configs."""
        base = (Config(BASE, self.base.config, (self.base,)),) if self.base else ()
        return base + self.configs

    @cached_property
    def deciding(self) -> DecidingRuns:
        """The runs that the verdict is about: those of the reached look where looks are registered, else all."""
        looks = self.settings.get("looks")
        counts = [look for look in looks if isinstance(look, int)] if isinstance(looks, list) else []
        seeds = self.registered_seeds
        try:
            return deciding_runs(self.scores, metric=self.metric, arms=self.arms[:2], seeds=seeds, looks=counts)
        except UsageError:  # no look is reached: nothing is decided yet
            return DecidingRuns(self.scores, seeds, [])

    @property
    def registered_seeds(self) -> dict[str, list[int]]:
        """The registered seeds per arm."""
        seeds = mapping(self.settings.get("seeds"))
        return {str(arm): list(row) for arm, row in seeds.items() if isinstance(row, list)}

    @cached_property
    def run_scores(self) -> pd.DataFrame:
        """The mean score of each run: split, scorer, arm, config, seed, score; unscored prompts are left out."""
        key = ["split", "scorer", "arm", "config", "seed"]
        found = self.scores.groupby(key, sort=False, as_index=False).agg({"score": "mean"})
        return found[found["score"].notna()]

    def run_means(self, config: Config, scorer: str, split: str) -> pd.Series:
        """Return the mean score of each run of a config, by seed; of the base, whatever its config is called."""
        rows = self.run_scores
        mine = rows[(rows["arm"] == config.arm) & (rows["split"] == split) & (rows["scorer"] == scorer)]
        if config.arm != BASE:
            mine = mine[mine["config"] == config.label]
            if config.trials:
                mine = mine[mine["seed"].isin([trial.seed for trial in config.trials])]
        return mine.groupby("seed")["score"].mean()

    def rows_of(self, config: Config, scorer: str) -> pd.DataFrame:
        """Return a config's scores by one scorer on the shown split, one row per seed and prompt."""
        rows = self.confirmed
        mine = rows[(rows["arm"] == config.arm) & (rows["scorer"] == scorer)]
        return mine if config.arm == BASE else mine[mine["config"] == config.label]

    def arm_scores(self, config: Config, scorer: str) -> ArmScores | None:
        """Return a config's scores on the shown split, shape (num_seeds, num_prompts), NaN where unscored.

        Returns:
            None without scores, or where its runs were not scored on the same prompts.
        """
        rows = self.rows_of(config, scorer)
        rows = rows.assign(config=config.label, seed=as_names(rows["seed"]))
        try:
            return arm_scores(rows, config.arm, config.label)
        except UsageError:
            return None

    def completions(self, trial: Trial) -> list[Completion]:
        """Return a trial's completions on the shown split."""
        return [row for row in trial.completions if row["split"] == self.split]

    def label(self, config: Config) -> str:
        """Return a config's name: its arm alone where the arm has no other config."""
        alone = sum(other.arm == config.arm for other in self.configs) <= 1
        return config.arm if alone or config.arm == BASE else f"{config.arm} ({config.label.replace(',', ', ')})"

    def missing_runs(self) -> list[tuple[str, int]]:
        """List the registered (arm, seed) for which no trial was scored; a look at fewer seeds needs no more."""
        look = mapping(self.verdict.get("look")).get("seeds")
        count = look if isinstance(look, int) else None
        done = {(trial.arm, trial.seed) for trial in self.trials if trial.scored}
        return [
            (arm, seed) for arm, row in self.registered_seeds.items() for seed in row[:count] if (arm, seed) not in done
        ]


def read_study(folder: Path, files: FileCache | None = None) -> Study:
    """Read a study.

    Args:
        folder: of the study.
        files: cache of this process; None reads each file anew.

    Raises:
        UsageError: the folder is absent, or holds none of the files of a study.
    """
    _check_folder(folder)
    files = files or FileCache()
    reader = Reader(folder, files)
    root = folder / "trials"
    trials = [_read_trial(reader, path) for path in sorted(root.iterdir()) if path.is_dir()] if root.is_dir() else []
    base = _read_trial(reader, folder / "base") if (folder / "base").is_dir() else None
    return Study(
        folder=folder,
        files=files,
        settings=reader.mapping(folder / "study.yaml"),
        base=base if base and (base.manifest or base.completions) else None,
        trials=tuple(trials),
        scores=_read_scores(reader, folder),
        verdict=reader.mapping(folder / "verdict.json"),
        selection=reader.mapping(folder / "selection.json"),
        problems=tuple(reader.problems),
    )


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; give the folder of a study, such as results/STUDY")
    if any((folder / name).exists() for name in _MARKERS):
        return
    inside = sorted(path.name for path in folder.iterdir() if any((path / name).exists() for name in _MARKERS))
    hint = f"; it holds these studies, give one of them: {', '.join(inside[:10])}" if inside else ""
    raise UsageError(
        f"{folder}: not a study (it holds none of {', '.join(_MARKERS)}); give the folder that "
        f"`python -m harness.sweep` wrote, such as results/STUDY{hint}"
    )


def _read_trial(reader: Reader, folder: Path) -> Trial:
    manifest = reader.mapping(folder / "manifest.json")
    if not is_as_written(manifest):
        reader.note(folder / "manifest.json", "it was changed after its trial wrote it")
        manifest = {}
    failure = reader.mapping(folder / "failure.json")
    # The runner removes failure.json when a later attempt succeeds: where it exists, the last attempt failed.
    state = FAILED if failure else _STATES.get(str(manifest.get("status")), UNFINISHED)
    known = manifest or failure or _name_in_config(reader.mapping(folder / "config.yaml"))
    seed = known.get("seed")
    return Trial(
        trial_id=folder.name,
        arm=str(known.get("arm", "")),
        config=str(known.get("config", "")),
        seed=seed if isinstance(seed, int) else None,
        state=state,
        manifest=manifest,
        failure=failure,
        steps=tuple(reader.rows(folder / "train.jsonl")),
        completions=tuple(_completion(row) for row in reader.rows(folder / "completions.jsonl")),
    )


def _completion(row: Mapping[str, Json]) -> Completion:
    tokens, thinking_tokens = row.get("tokens"), row.get("thinking_tokens")
    return {
        "split": str(row.get("split", "")),
        "prompt_id": str(row.get("prompt_id", "")),
        "prompt": str(row.get("prompt", "")),
        "completion": str(row.get("completion", "")),
        "tokens": tokens if isinstance(tokens, int) else None,
        "thinking_tokens": thinking_tokens if isinstance(thinking_tokens, int) else None,
        "flags": strings(row.get("flags")),
    }


def _name_in_config(config: Mapping[str, Json]) -> dict[str, Json]:
    return {"arm": mapping(config.get("method")).get("name", ""), "seed": config.get("seed")}


def _read_scores(reader: Reader, folder: Path) -> pd.DataFrame:
    path = folder / "scores.csv"
    frame = pd.DataFrame()
    if path.exists():
        try:
            frame = read_scores_csv(path)
            if missing := {"arm", "split", "scorer", "score"} - set(frame.columns):
                frame = pd.DataFrame()
                raise ValueError(f"it lacks the columns {', '.join(sorted(missing))}")
        except (OSError, ValueError) as error:
            reader.note(path, error)
    if frame.empty:
        files = [*sorted(folder.glob("trials/*/scores.jsonl")), folder / "base" / "scores.jsonl"]
        frame = pd.DataFrame([row for file in files for row in reader.rows(file)])
    frame = frame.reindex(columns=list(SCORE_COLUMNS))
    for column in _NUMERIC:
        frame[column] = pd.to_numeric(frame[column], errors="coerce")
    texts = [column for column in SCORE_COLUMNS if column not in _NUMERIC]
    frame[texts] = frame[texts].astype("object").where(frame[texts].notna(), "").astype(str)
    return frame
