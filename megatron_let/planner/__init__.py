"""Memory, arithmetic and step time of a run before it starts. Pure, but for reading configs."""
