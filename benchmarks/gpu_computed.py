"""Products of Llama-3-8B by layout, computed from its shape and from drawn lengths: the table in gpu.md.

Command: `python benchmarks/gpu_computed.py`; prints the table.
"""

from __future__ import annotations

from collections.abc import Sequence

from gpu_harness import TokenPair, llama_config, pairs_like_ultrafeedback

from harness.data.plan import make_plan
from harness.sweep.products import Work, forward_flops, needed, padded, shape_of_config, training_flops

PAIRS = 61135  # of UltraFeedback, binarised
DRAWN = 4000  # pairs whose lengths stand for all
STEP, MICRO, RANK = 8, 4, 16
RATE = 600e12  # FLOP/s in bf16, assumed of an H100


def table() -> str:
    """Return the table."""
    return "\n".join(
        [
            "| layout | tokens a pair | forward, TFLOP | forward and backward | with checkpointing "
            "| hours an epoch, without / with | reference pass, h |",
            "|---|---|---|---|---|---|---|",
            *(_row(name, work) for name, work in _layouts(pairs_like_ultrafeedback(DRAWN, 128256)).items()),
        ]
    )


def _layouts(rows: Sequence[TokenPair]) -> dict[str, Work]:
    lengths = [row.length for row in rows]

    def ordered(lengths: Sequence[int]) -> list[TokenPair]:
        plan = make_plan(len(rows), epochs=1, batch_size=STEP, micro_batch_size=MICRO, seed=0, lengths=lengths)
        return [rows[number] for number in plan.order]

    return {
        "packed": needed(rows),
        "padded, sorted within a step": padded(ordered(lengths), micro_batch_size=MICRO),
        "padded, random order (TRL's script)": padded(ordered([]), micro_batch_size=MICRO),
    }


def _row(name: str, work: Work) -> str:
    shape = shape_of_config(llama_config("8b"))
    forward = forward_flops(shape, work, rank=RANK) / DRAWN
    both, again = (training_flops(shape, work, rank=RANK, recomputed=r) / DRAWN for r in (False, True))
    hours = [PAIRS * flops / RATE / 3600 for flops in (both, again, forward_flops(shape, work) / DRAWN)]
    return (
        f"| {name} | {work.tokens / DRAWN:,.0f} | {forward / 1e12:.1f} | {both / 1e12:.1f} | {again / 1e12:.1f} "
        f"| {hours[0]:.2f} / {hours[1]:.2f} | {hours[2]:.2f} |"
    )


if __name__ == "__main__":
    print(table())
