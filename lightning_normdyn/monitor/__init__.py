"""What is measured during a run, how it is kept, and how a person sees it."""
