"""Training, pruning experiments and whole runs."""
