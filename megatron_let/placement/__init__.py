"""Placement of the teacher in the pipeline: plans, their simulation and their execution."""
