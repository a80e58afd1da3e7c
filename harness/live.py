"""What a running trial says of itself while it trains: a line a step in `live.jsonl`, for the dashboard alone."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from harness.reader import Reader

_FILE = "live.jsonl"
_MAX_CURVES = 12
_FRESH_SECONDS = 120.0
_MAX_POINTS = 400


def note_step(folder: Path, step: int, total: int, loss: float | None) -> None:
    """Add a step to a trial's live log; what cannot be written is left out, and training goes on."""
    with contextlib.suppress(OSError), (folder / _FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, "total": total, "loss": loss}) + "\n")


def end_log(folder: Path) -> None:
    """Remove the log of a trial whose training has ended: train.jsonl says it all."""
    (folder / _FILE).unlink(missing_ok=True)


def running_curves(results: Path, *, now: float) -> list[dict[str, Any]]:
    """Return the losses so far of trials that train now: study, trial, arm, `steps`, `losses`, `total`.

    A log to which nothing was added for two minutes is that of a trial that was killed, and is left out; so is one from
    the future, which is what a clock that was set back leaves.
    """
    curves: list[dict[str, Any]] = []
    for path in sorted(results.glob(f"*/trials/*/{_FILE}")):
        if len(curves) == _MAX_CURVES or abs(now - path.stat().st_mtime) > _FRESH_SECONDS:
            continue
        rows = Reader(path.parent.parent.parent).rows(path)
        rows = [row for row in rows if isinstance(row.get("loss"), int | float)][-_MAX_POINTS:]
        if not rows:
            continue
        manifest = Reader(path.parent.parent.parent).mapping(path.parent / "manifest.json")
        about = {"study": path.parts[-4], "trial": path.parts[-2], "arm": str(manifest.get("arm", ""))}
        steps = {"steps": [row["step"] for row in rows], "losses": [row["loss"] for row in rows]}
        curves.append({**about, **steps, "total": rows[-1].get("total")})
    return curves
