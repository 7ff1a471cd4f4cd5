"""What one fit of any callback needs: targets, plans, the session, state over resumes."""
