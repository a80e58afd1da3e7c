"""The files of a study: read, write, lock, seal. Knows no config and loads no library of training."""
