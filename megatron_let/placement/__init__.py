"""Where in the pipeline the teacher runs: pure plans and simulation, and their execution."""
