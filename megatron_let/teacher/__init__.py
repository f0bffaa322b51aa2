"""The small frozen model: its folder, its tokenizer, its hidden state."""
