"""From stored answers to scores in [0, 1]."""
