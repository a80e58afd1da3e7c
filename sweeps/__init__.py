"""Named sweeps: data, selected with `+sweep=NAME`."""
