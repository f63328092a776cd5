"""A run of several ranks: they agree on which step is taken, and one of them says what became of it."""
