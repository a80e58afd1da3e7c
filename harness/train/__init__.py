"""From token ids to an adapter: the only home of TRL outside of the benchmarks and the embedded study."""
