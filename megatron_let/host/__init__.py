"""Running Megatron on what the machine has: a GPU or a CPU, Transformer Engine or torch."""
