"""Checkpoints: Megatron's torch_dist format to Hugging Face Llama folders and back."""
