"""Metrics files: write, read, compare, report."""
