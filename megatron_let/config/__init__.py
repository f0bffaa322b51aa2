"""The configuration of a run: flags, recipes, LETConfig and their validation."""
