"""The embedded study: a tiny chat model, its preference pairs and its golden prompts, shipped in the package.

It is the default of every command: no download, no account, no GPU. `python -m harness.embedded` builds it again.
"""

from pathlib import Path


def study_dir() -> Path:
    """Return the folder of the shipped base model, tokenizer, train.jsonl, dev.jsonl, golden.jsonl and card.json."""
    return Path(__file__).resolve().parent / "study"
