"""Runs held against a baseline, and lists of runs trained for it; works on finished files only."""
