"""One training run: its output folder, control files, wandb artifacts, and resume point."""
