"""The small frozen model: locate it, load it, read its hidden states and logits."""
