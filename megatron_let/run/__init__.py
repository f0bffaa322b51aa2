"""One training run: its output folder, control files, wandb artifacts, and where it resumes."""
