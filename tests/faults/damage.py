"""Files of a study that are cut off, or overwritten at equal size: the same command mends, or refuses by name."""

from __future__ import annotations

import collections
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from harness.study.backup import NAMES
from tests.faults.disturbed import Undisturbed, ended, log_of, start, verified

Damage = Callable[[Path, random.Random], None]


def truncate(path: Path, rng: random.Random) -> None:
    """Cut a file off somewhere, as a full disk or a crash of the machine does."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(rng.randrange(size) if size else 0)


def overwrite(path: Path, rng: random.Random) -> None:
    """Put random bytes into the middle of a file, as a bad disk does; its size stays."""
    _put(path, rng.randbytes)


def zero(path: Path, rng: random.Random) -> None:
    """Put NUL bytes into the middle of a file, as a crash of the machine does; its size stays."""
    _put(path, bytes)


def change_digit(path: Path, rng: random.Random) -> None:
    """Make one digit another: the file keeps its size, and JSON stays JSON."""
    content = bytearray(path.read_bytes())
    digits = [place for place, byte in enumerate(content) if byte in b"0123456789"]
    if digits:
        place = rng.choice(digits)
        content[place] = ord("1") + (content[place] - ord("0")) % 9  # never 0, which may not lead a number
        path.write_bytes(content)


def any_damage(path: Path, rng: random.Random) -> None:
    """Do one of these to a file."""
    rng.choice((truncate, overwrite, zero, change_digit))(path, rng)


def _put(path: Path, new: Callable[[int], bytes]) -> None:
    content = bytearray(path.read_bytes())
    length = min(64, max(1, len(content) // 3))
    middle = slice((len(content) - length) // 2, (len(content) + length) // 2)
    content[middle] = new(length)
    path.write_bytes(content)


def damages(study: Undisturbed, damage: Damage, rng: random.Random, at_once: int) -> collections.Counter[str]:
    """Damage one file of each kind: of a finished study, and of one that was killed in a trial's training.

    Args:
        study: the undisturbed study.
        damage: what is done to a file.
        rng: which file of a kind it is done to.
        at_once: how many kinds are damaged in one study before the command runs again.
    """
    hits: collections.Counter[str] = collections.Counter()
    template = study.new("finished", copy=study.folder)
    hits += _each(study, template, _kinds(template / "results", "*"), damage, rng, at_once)
    template, trial = study.half("half", rng)
    kinds = _kinds(template / "results", trial.name)
    of_training = {kind: paths for kind, paths in kinds.items() if kind.startswith(("TRIAL", "reference"))}
    killed = _each(study, template, of_training, damage, rng, at_once)
    return hits + collections.Counter({f"killed: {kind}": count for kind, count in killed.items()})


def _kinds(results: Path, trial: str) -> dict[str, list[Path]]:
    """Return files by their kind, relative to the folder of results; of trials those of the given one."""
    kinds: dict[str, list[Path]] = collections.defaultdict(list)
    for path in sorted(path for path in results.rglob("*") if path.is_file() and path.stat().st_size):
        parts = path.relative_to(results).parts
        if parts[1:2] == ("trials",):
            if trial in ("*", parts[2]):
                inner = ("checkpoint" if part.startswith("checkpoint-") else part for part in parts[3:])
                kinds["/".join(("TRIAL", *inner))].append(path.relative_to(results))
        else:
            kinds["reference log-probs" if parts[0] == ".cache" else "/".join(parts[1:])].append(
                path.relative_to(results)
            )
    return kinds


def _each(
    study: Undisturbed, template: Path, kinds: dict[str, list[Path]], damage: Damage, rng: random.Random, at_once: int
) -> collections.Counter[str]:
    hits: collections.Counter[str] = collections.Counter()
    for group in _groups(sorted(kinds), at_once):
        folder = study.new("damaged", copy=template)
        changed = [kind for kind in group if _changes(folder / "results" / rng.choice(kinds[kind]), damage, rng)]
        what = f"{template.name}: {', '.join(changed)} after {damage.__name__}"
        assert verified(folder) in (0, 1), f"{what}: verify\n{log_of(folder)}"
        assert "Traceback" not in log_of(folder), f"{what}: verify\n{log_of(folder)}"
        hits.update(_ends(study, folder, template, changed, what))
    return hits


def _changes(path: Path, damage: Damage, rng: random.Random) -> bool:
    before = path.read_bytes()
    damage(path, rng)
    return path.read_bytes() != before


def _ends(study: Undisturbed, folder: Path, template: Path, group: Sequence[str], what: str) -> Iterator[str]:
    """Run the command; where it refuses a file that nothing can make again, by name, put the file back for it."""
    registered = [kind for kind in group if kind in NAMES]
    refused = []
    while (status := ended(start(folder / "results"))) == 2:
        named = [name for name in registered if f"faults/{name}: " in log_of(folder) and name not in refused]
        assert len(named) == 1, f"{what}: refused, and no damaged file is named\n{log_of(folder)}"
        refused += named
        path = Path("results", "faults", named[0])
        (folder / path).write_bytes((template / path).read_bytes())
    assert status == 0, f"{what}: exit status {status}\n{log_of(folder)}"
    study.is_right(folder, what=what)
    for kind in group:
        yield f"{kind} ({'refused by name' if kind in refused else 'put back'})" if kind in registered else kind


def _groups(kinds: Sequence[str], size: int) -> Iterator[list[str]]:
    """Split kinds into groups in which no file stands beside its own twin: two damages of one file are two faults."""
    groups: list[list[str]] = [[] for _ in range(-(-len(kinds) // size))]
    for number, kind in enumerate(kinds):
        alone = [group for group in groups if _file(kind) not in map(_file, group)]
        min(alone or [groups[number % len(groups)]], key=len).append(kind)
    yield from filter(None, groups)


def _file(kind: str) -> str:
    """Name the file that a kind, its twin and its twin's hash are copies of."""
    return kind.replace(".twins/", "").removesuffix(".sha256")
