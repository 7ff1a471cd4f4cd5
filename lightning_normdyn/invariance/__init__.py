"""Which weights are scale-invariant, at which granularity, and how that is known."""
