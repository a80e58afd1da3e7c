"""How a study runs its models on pairs: one decision for all arms, the reference and the held-out pairs. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from harness.config.schema import AccelerateConfig

Way = Literal["packed", "padded", "alone"]


@dataclass(frozen=True)
class Layout:
    """How a model is run on pairs.

    Attributes:
        way: `packed` is one row without padding; `padded` is TRL's own; `alone` is one forward pass for each answer.
        why: why it is not packed, where that was requested.
        still: whether the model trains in evaluation mode (`harness.train.pure.make_still`).
    """

    way: Way = "packed"
    why: str = ""
    still: bool = False


def processes_problem(layout: Layout, accelerate: AccelerateConfig) -> str:
    """Say why several processes cannot train in a layout; empty where they can.

    Processes that hold parts of each layer gather them in each forward pass, so that all must run equally many.
    """
    kind, count = accelerate.distributed_type, accelerate.num_processes
    if layout.way != "alone" or count == 1 or kind == "MULTI_GPU":
        return ""
    return (
        f"accelerate.distributed_type={kind}: this model is run one answer at a time ({layout.why}), and processes "
        "that share its weights would wait for each other where one has fewer answers; use accelerate=ddp, where each "
        "process holds the whole model"
    )
