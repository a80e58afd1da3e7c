"""One study, read from its folder into one object; half-finished, failed and broken trials are part of it.

Input: `results/STUDY/` in whatever state a sweep left it. Nothing is written, and nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from harness.config.arms import BASE
from harness.study.errors import UsageError
from harness.study.files import Reader, mapping, strings
from harness.study.manifest import is_as_written
from harness.study.scores_csv import SCORE_COLUMNS, read_scores_csv

_MARKERS = ("study.yaml", "trials", "scores.csv", "verdict.json")
_NUMERIC = ("seed", "score", "tokens", "chars")
COMPLETE, DIVERGED, FAILED, UNFINISHED = "complete", "diverged", "failed", "unfinished"
_STATES = {"complete": COMPLETE, "diverged": DIVERGED}


@dataclass(frozen=True)
class Trial:
    """One training run (or the base), as far as it came.

    Attributes:
        state: `complete`, `diverged`, `failed` or `unfinished`.
        manifest, failure: the files of these names; empty where there is none.
        steps: rows of train.jsonl, one a logged step.
        completions: rows of completions.jsonl: split, prompt_id, prompt, completion, tokens and flags.
    """

    trial_id: str
    arm: str
    config: str
    seed: int | None
    state: str
    manifest: Mapping[str, Any]
    failure: Mapping[str, Any]
    steps: tuple[Mapping[str, Any], ...]
    completions: tuple[Mapping[str, Any], ...]

    @cached_property
    def curve(self) -> pd.DataFrame:
        """The steps, numbers only; made where it is drawn: of hundreds of trials a report draws a few."""
        return pd.DataFrame(list(self.steps)).apply(pd.to_numeric, errors="coerce")

    @property
    def scored(self) -> bool:
        """Whether its scores count: a diverged trial's do."""
        return self.state in (COMPLETE, DIVERGED)


@dataclass(frozen=True)
class Config:
    """An arm with its hyperparameters, seed left out, and its trials in the order of their seeds."""

    arm: str
    label: str
    trials: tuple[Trial, ...]


@dataclass(frozen=True)
class Study:
    """All that a study's folder says.

    Attributes:
        settings: study.yaml; empty where there is none.
        scores: scores.csv, or the trials' scores.jsonl where the sweep has not come that far.
        verdict: verdict.json; empty before the decision.
        problems: what could not be read, one sentence each.
        selection: selection.json; empty where nothing was tuned, or nothing is selected yet.
    """

    folder: Path
    settings: Mapping[str, Any]
    base: Trial | None
    trials: tuple[Trial, ...]
    scores: pd.DataFrame
    verdict: Mapping[str, Any]
    problems: tuple[str, ...]
    selection: Mapping[str, Any] = field(default_factory=dict)

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
        """The scorer that decides; the first in the scores where nobody has said."""
        first = next(iter(self.scores["scorer"].unique()), "")
        return str(self.verdict.get("metric") or self.settings.get("metric") or first)

    @cached_property
    def split(self) -> str:
        """The split that is shown: `golden`, or `dev` as long as nothing golden is there."""
        rows = list(self.scores["split"].unique()) + [c.get("split") for t in self.trials for c in t.completions[:1]]
        return "dev" if "dev" in rows and "golden" not in rows else "golden"

    @cached_property
    def confirmed(self) -> pd.DataFrame:
        """Scores of the shown split: those of the confirmation, where configs were selected before."""
        rows = self.scores[self.scores["split"] == self.split]
        confirm = rows[rows["stage"] == "confirm"]
        return confirm if len(confirm) else rows

    @cached_property
    def configs(self) -> tuple[Config, ...]:
        """The configs that stand for their arms: those with confirmed scores, or all while there are none.

        Scores without trials, as another program may have written them, give configs without trials.
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

    def completions(self, trial: Trial) -> list[Mapping[str, Any]]:
        """Return a trial's completions on the shown split."""
        return [row for row in trial.completions if row["split"] == self.split]

    def label(self, config: Config) -> str:
        """Name a config: by its arm alone where the arm has no other."""
        alone = sum(other.arm == config.arm for other in self.configs) <= 1
        return config.arm if alone or config.arm == BASE else f"{config.arm} ({config.label.replace(',', ', ')})"

    def missing_runs(self) -> list[tuple[str, int]]:
        """List the registered (arm, seed) for which no trial was scored; a look at fewer seeds needs no more."""
        look = mapping(self.verdict.get("look")).get("seeds")
        done = {(trial.arm, trial.seed) for trial in self.trials if trial.scored}
        registered = mapping(self.settings.get("seeds"))
        rows = {str(arm): row[:look] for arm, row in registered.items() if isinstance(row, list)}
        return [(arm, seed) for arm, row in rows.items() for seed in row if (arm, seed) not in done]


def read_study(folder: Path) -> Study:
    """Read a study.

    Raises:
        UsageError: the folder is absent, or holds none of the files of a study.
    """
    _check_folder(folder)
    reader = Reader(folder)
    root = folder / "trials"
    trials = [_read_trial(reader, path) for path in sorted(root.iterdir()) if path.is_dir()] if root.is_dir() else []
    base = _read_trial(reader, folder / "base") if (folder / "base").is_dir() else None
    return Study(
        folder=folder,
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
    # The runner removes failure.json when a later attempt succeeds: where it stands, the last attempt failed.
    state = FAILED if failure else _STATES.get(str(manifest.get("status")), UNFINISHED)
    known = manifest or failure or _from_config(reader.mapping(folder / "config.yaml"))
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


def _completion(row: dict[str, Any]) -> dict[str, Any]:
    """Give a row all keys of a completion, whatever a broken or foreign file holds."""
    texts = {key: str(row.get(key, "")) for key in ("split", "prompt_id", "prompt", "completion")}
    tokens = row.get("tokens")
    flags = strings(row.get("flags"))
    return {**texts, "tokens": tokens if isinstance(tokens, int) else None, "flags": flags}


def _from_config(config: dict[str, Any]) -> dict[str, Any]:
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
    frame[texts] = frame[texts].fillna("").astype(str)
    return frame


def run_means(study: Study, config: Config, scorer: str, split: str) -> pd.Series:
    """Return the mean score of each of a config's runs, by seed; unscored prompts are left out."""
    rows = study.scores
    mine = rows[(rows["arm"] == config.arm) & (rows["split"] == split) & (rows["scorer"] == scorer)]
    if config.arm != BASE:
        mine = mine[mine["config"] == config.label]
    if config.arm != BASE and config.trials:
        mine = mine[mine["seed"].isin([trial.seed for trial in config.trials])]
    return mine.groupby("seed")["score"].mean().dropna()
