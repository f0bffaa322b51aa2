"""What a run asks for: flags, recipes and their validation."""
