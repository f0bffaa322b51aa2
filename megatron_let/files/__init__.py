"""Atomic writes and the names of a run's files."""
