"""Aligning a student layer with the teacher: weight, shards, and the hook."""
