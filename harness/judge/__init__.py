"""The pairwise judge: prompts, requests, cache, verdicts, and what there is to know of the judge itself."""
