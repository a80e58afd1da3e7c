"""From the command line to a validated `RunConfig`: keys, arms, search spaces, the trial id."""
