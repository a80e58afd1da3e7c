"""From a policy to answers and held-out log-probabilities."""
