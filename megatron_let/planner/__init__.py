"""Predict a run's memory, FLOPs and step time before it starts."""
