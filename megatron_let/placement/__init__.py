"""Where in the pipeline the teacher runs: schedules, their simulation, and plans. Pure."""
