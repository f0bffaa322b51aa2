"""Scalars that Megatron logs, as float32."""

from __future__ import annotations

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def scalars(folder: Path, name: str) -> dict[int, float]:
    """Return {iteration: value} of one scalar in a TensorBoard folder."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(name)}
