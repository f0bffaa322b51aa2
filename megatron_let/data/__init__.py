"""Text to Megatron's indexed format, and indexed data to batches."""
