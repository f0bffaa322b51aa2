"""Learning from the teacher's output distribution: RKD and SALT."""
