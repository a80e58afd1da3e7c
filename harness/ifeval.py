"""The scorers `ifeval` and `ifeval_loose`: verifiable instructions, checked by lm-evaluation-harness's own code.

Zhou et al. 2023 (arXiv 2311.07911). A prompt scores 1 where the answer follows all of its instructions; `loose` also
takes the answer without its first or last line, and without asterisks.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from typing import Any

SENTENCES = "python -m nltk.downloader punkt_tab"
EXTRA = "pip install 'dpo-simpo-harness[lm-eval]'"
_METRICS = {"ifeval": "prompt_level_strict_acc", "ifeval_loose": "prompt_level_loose_acc"}


def ifeval_problem() -> str | None:
    """Say why instructions cannot be checked here, or None where they can."""
    missing = [name for name in ("lm_eval", "langdetect", "immutabledict", "nltk") if find_spec(name) is None]
    return f"{', '.join(missing)} not installed ({EXTRA})" if missing else None


@contextlib.contextmanager
def _no_download() -> Iterator[None]:
    """Keep lm-evaluation-harness from downloading at import: it does so in the first of several processes only."""
    rank = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = "1"
    try:
        yield
    finally:
        if rank is None:
            del os.environ["LOCAL_RANK"]
        else:
            os.environ["LOCAL_RANK"] = rank


def follows_instructions(scorer: str, instructions: Mapping[str, Any], prompt: str, answer: str) -> float:
    """Return 1.0 where the answer follows all instructions, else 0.0.

    Args:
        scorer: `ifeval` or `ifeval_loose`.
        instructions: `instruction_id_list` and `kwargs` of an IFEval row.
        prompt: its text.
        answer: the completion.

    Raises:
        LookupError: where an instruction needs NLTK's sentence data and it is not installed.
        KeyError: for an instruction that the installed version does not know.
    """
    with _no_download():
        from lm_eval.tasks.ifeval.utils import process_results
    import langdetect

    langdetect.DetectorFactory.seed = 0  # else the language of a short answer changes from run to run
    document = {"key": 0, "prompt": prompt, **instructions}
    return float(process_results(document, [answer])[_METRICS[scorer]])


def why_unchecked(error: Exception) -> str:
    """Say why instructions could not be checked."""
    if isinstance(error, KeyError):
        return f"the instruction {error} is not known to the installed lm-evaluation-harness"
    if isinstance(error, LookupError):
        return f"an instruction needs NLTK's sentence data ({SENTENCES})"
    return f"the instructions cannot be checked ({type(error).__name__}: {error})"


def unchecked(asked: Iterable[tuple[Mapping[str, Any], str]]) -> Counter[str]:
    """Count the (instructions, prompt) that cannot be checked on this machine, by reason."""
    found: Counter[str] = Counter()
    for instructions, prompt in asked:
        try:
            follows_instructions("ifeval", instructions, prompt, "Yes, it is.")
        except (LookupError, TypeError, ValueError) as error:
            found[why_unchecked(error)] += 1
    return found
