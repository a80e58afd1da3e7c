"""Mirror runs and studies to a tracker: W&B, offline by default."""
