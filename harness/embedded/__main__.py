"""Build the embedded study again: `python -m harness.embedded [--out DIR] [--seed N]`."""

from __future__ import annotations

import argparse
from pathlib import Path

from harness.config.paths import embedded_dir


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m harness.embedded",
        description="Build the embedded study from a seed: SFT base, on-policy preference pairs, golden prompts.",
        epilog="Example: python -m harness.embedded --out my-study --seed 1",
    )
    parser.add_argument("--out", type=Path, default=embedded_dir(), help="folder to write (default: the shipped one)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    from harness.embedded.build import build

    card = build(options.out, options.seed)
    print(
        f"{options.out}: the base scores {card['base']['golden_score']:.3f} on golden; built in {card['seconds']:.0f} s"
    )


if __name__ == "__main__":
    main()
