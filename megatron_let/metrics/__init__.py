"""Write and read metrics files; compare runs and report."""
