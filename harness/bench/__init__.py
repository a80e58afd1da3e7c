"""What a paired sweep costs: the harness against TRL's own scripts, on the same pairs, in one run.

Command: `python -m harness.bench`.
"""
