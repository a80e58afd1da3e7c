"""The command: one trial, one study, Hydra, launchers, W&B."""
