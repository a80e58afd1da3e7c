"""What scorers of one's own import (docs/scorers.md)."""

from harness.score.scorers import Score, TrialOutputs

__all__ = ["Score", "TrialOutputs"]
