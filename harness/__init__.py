"""Decide whether to ship DPO or SimPO: paired training runs, held-out scores, a verdict with calibrated error rates."""

from __future__ import annotations

__version__ = "0.1.0"
