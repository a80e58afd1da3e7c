"""The Hydra config."""
