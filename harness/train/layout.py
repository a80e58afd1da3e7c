"""How a study runs its models on pairs: one decision for all arms, the reference and the held-out pairs. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
