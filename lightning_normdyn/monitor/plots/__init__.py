"""Pictures of a run, drawn from its history: one file per family."""
