"""One training run: its forward step, output folder, control files and artifacts."""
