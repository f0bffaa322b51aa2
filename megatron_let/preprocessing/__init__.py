"""Text to Megatron's indexed data on datatrove: read, tokenize, merge; local, Slurm or Ray."""
