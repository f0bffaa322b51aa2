"""Tokenizers, fingerprints of data, and indexed data to batches."""
