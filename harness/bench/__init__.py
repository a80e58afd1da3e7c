"""Cost of a paired sweep: the harness against TRL's own scripts, on the same pairs, in one run."""
