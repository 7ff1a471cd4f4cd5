"""Everything that is known about an optimizer: how it steps, when, and who decays its weights."""
