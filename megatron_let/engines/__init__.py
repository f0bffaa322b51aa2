"""Engines that take a training step in place of Megatron's DDP and optimizers."""
