"""From scores to a verdict. Imports neither torch nor Hydra."""

from harness.decide.rule import verdict

__all__ = ["verdict"]
