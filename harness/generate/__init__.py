"""From a policy to stored answers and held-out log-probabilities."""
