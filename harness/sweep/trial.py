"""A trial as the sweep assigns it (config, identity, folder, splits), and the context of a process that runs trials."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.config.arms import ARMS, MethodConfig
from harness.config.checkpoint import Checkpoints
from harness.config.compose import config_from
from harness.config.machine import Machine
from harness.config.schema import RunConfig
from harness.config.trial_id import config_label, plain
from harness.data.inputs import Inputs
from harness.study.decision import golden_problem
from harness.study.errors import UsageError
from harness.study.files import FileCache, read_json, write_json
from harness.study.integrity import done_stages
from harness.study.manifest import load_manifest, read_manifest
from harness.study.outcome import Outcome
from harness.study.rows import TrialName
from harness.sweep.launchers import Slots
from harness.track.tracker import Trackers
from harness.train.base import Bases
from harness.train.derived import derive
from harness.train.memory import FrozenImports


@dataclass
class Context:
    """State that trials of one process share: made by the driver of a sweep, or by a worker process, and passed down.

    Attributes:
        machine: its devices.
        inputs: splits, token ids and hashes of the data sets and checkpoints in use.
        bases: the base in memory, lent from trial to trial.
        trackers: whether W&B can be reached.
        slots: the GPUs or cores that this process holds.
        imports: keeps imported modules out of the garbage collector's rounds.
        files: contents and hashes of files, each state of a file read once.
    """

    machine: Machine = field(default_factory=Machine.here)
    inputs: Inputs = field(default_factory=lambda: Inputs(Checkpoints(derive)))
    files: FileCache = field(default_factory=FileCache)
    trackers: Trackers = field(default_factory=Trackers)
    imports: FrozenImports = field(default_factory=FrozenImports)
    bases: Bases = field(init=False)
    slots: Slots = field(init=False)

    def __post_init__(self) -> None:
        self.bases = Bases(self.inputs.checkpoints.folder)
        self.slots = Slots(self.machine)


@dataclass(frozen=True)
class Trial:
    """One training run, or the SFT base, with what the sweep decides about it.

    Attributes:
        config: with its seed; `study` is the study's name, and no default is open.
        trial_id: hash of what determines the result; computed once, when the study is designed.
        folder: where its files are.
        splits: the splits that it answers and scores; a config that is not selected never answers `golden`.
        cost_name: name of a trial that is run for its cost alone.
        proves: arms of the study with their hyperparameters, whose losses the SFT base proves before any is trained.
    """

    config: RunConfig
    trial_id: str
    folder: Path
    splits: tuple[str, ...]
    cost_name: str | None = None
    proves: tuple[MethodConfig, ...] = ()

    @property
    def study(self) -> Path:
        """The study's folder."""
        return self.config.study_folder

    @property
    def arm(self) -> str:
        """The arm's name; `sft` for the base."""
        return self.config.method.name

    @property
    def seed(self) -> int:
        """Seed of the LoRA initialisation and of the order of the data."""
        return self.config.seed

    @property
    def label(self) -> str:
        """The config's hyperparameters in short."""
        return config_label(self.config)

    @property
    def name(self) -> TrialName:
        """What names this trial in its files."""
        return {"trial_id": self.trial_id, "arm": self.arm, "config": self.label, "seed": self.seed}

    @property
    def is_trained(self) -> bool:
        """Whether a trainer runs: the base is only answered and scored."""
        return ARMS[self.arm].trainer is not None

    def is_complete(self, files: FileCache | None = None) -> bool:
        """Return whether the manifest has all stages of this very config, and their files are as they were."""
        manifest = read_manifest(self.folder, files)
        if manifest.get("trial_id") != self.trial_id:
            return False
        return {"score", *self.splits} <= done_stages(self.folder, manifest, files=files)

    def is_proved(self, files: FileCache | None = None) -> bool:
        """Return whether nothing is answered for this trial that was not proved first, whatever the backend."""
        return bool(self.splits) or "preconditions" in read_manifest(self.folder, files)

    def refuse_golden(self) -> None:
        """Raise a UsageError if this run of its study must not be scored on golden."""
        if "golden" in self.splits and self.is_trained:
            problem = golden_problem(self.study, self.arm, self.label, self.seed)
            if problem:
                raise UsageError(problem)

    def outcome(self, status: str, message: str = "", *, retries: bool = True) -> Outcome:
        """Return how this trial ended."""
        return Outcome(**self.name, status=status, message=message, retries=retries)

    def finished(self, files: FileCache | None = None) -> Outcome:
        """Read how this trial ended; it is complete."""
        facts = load_manifest(self.folder, files)
        return self.outcome(facts["status"], facts.get("divergence", ""))


def write_trial(path: Path, trial: Trial) -> None:
    """Write a trial for a worker process."""
    about: dict[str, Any] = {"config": plain(trial.config), "trial_id": trial.trial_id, "folder": str(trial.folder)}
    proves = [plain(method) for method in trial.proves]
    write_json(path, about | {"splits": list(trial.splits), "cost_name": trial.cost_name, "proves": proves})


def read_trial(path: Path) -> Trial:
    """Read what `write_trial` wrote."""
    found = read_json(path)
    config, folder = config_from(found["config"]), Path(found["folder"])
    proves = tuple(ARMS[method["name"]].config(**method) for method in found["proves"])
    return Trial(config, found["trial_id"], folder, tuple(found["splits"]), found["cost_name"], proves)
