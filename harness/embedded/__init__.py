"""The embedded study: a tiny chat model, its preference pairs and its golden prompts, shipped in the package.

It is the default of every command: no download, no account, no GPU. `python -m harness.embedded` builds it again.
"""

from __future__ import annotations
