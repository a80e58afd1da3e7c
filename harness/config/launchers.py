"""The table of launchers: which Hydra launcher runs trials where, how many at once, and what it needs installed."""

from __future__ import annotations

from dataclasses import dataclass

from harness.config.machine import Machine

_WAITING = 4  # processes that wait for each core or GPU


@dataclass(frozen=True)
class Launcher:
    """A way to run trials.

    Attributes:
        target: class name of the Hydra launcher.
        module: package that it needs; empty for what is always there.
        extra: extra of this project that installs the package.
        is_elsewhere: whether another system hands out cores and GPUs, perhaps on other machines.
        in_process: whether trials run one by one in the process of the sweep, without Hydra's launcher.
        one_process_each: whether every trial of a launch gets a process at once, and waits there for its slot.
        has_queue: whether submitit watches the jobs in Slurm's queue.
        trials_at_once: trials that train beside each other; None: one per GPU or core of this machine.
    """

    target: str
    module: str = ""
    extra: str = ""
    is_elsewhere: bool = False
    in_process: bool = False
    one_process_each: bool = False
    has_queue: bool = False
    trials_at_once: int | None = None

    def at_once(self, machine: Machine, processes: int) -> int:
        """Return how many trials of so many processes train beside each other."""
        return self.trials_at_once or machine.workers(processes)

    def batch(self, trials: int, machine: Machine, processes: int) -> int:
        """Return how many trials are launched together: all, or a few where each takes a process at once."""
        return _WAITING * machine.workers(processes) if self.one_process_each else trials


LAUNCHERS = {
    "basic": Launcher("BasicLauncher", in_process=True, trials_at_once=1),
    "joblib": Launcher("JoblibLauncher", "hydra_plugins.hydra_joblib_launcher", "launchers"),
    "submitit_local": Launcher(
        "LocalLauncher", "hydra_plugins.hydra_submitit_launcher", "launchers", one_process_each=True
    ),
    "submitit_slurm": Launcher(
        "SlurmLauncher",
        "hydra_plugins.hydra_submitit_launcher",
        "launchers",
        is_elsewhere=True,
        has_queue=True,
        trials_at_once=8,  # a guess: the queue decides
    ),
    "ray": Launcher("RayLauncher", "ray", "ray", is_elsewhere=True),
}


def launcher_of(target: str) -> Launcher:
    """Return the row of a Hydra launcher by the path of its class; an unknown launcher gets a row of its own."""
    name = target.rpartition(".")[2]
    return next((row for row in LAUNCHERS.values() if row.target == name), Launcher(name))
