"""Checkpoints of both engines: read, describe, compare, convert to and from Hugging Face."""
