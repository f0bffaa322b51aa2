"""Names of the files in a run's folders."""

from __future__ import annotations

# In the run's folder: the metrics, one JSON line per step.
METRICS = "metrics.jsonl"
# In its checkpoint folder.
# Written by Megatron: the last complete checkpoint.
TRACKER = "latest_checkpointed_iteration.txt"
# What the folder holds, so that no run overwrites another.
RUN = "run.json"
# An operator's requests: save and end the run; save and continue.
STOP = "STOP"
SAVE_NOW = "SAVE_NOW"
# Written by the run after its last step is saved.
DONE = "DONE"


def checkpoint_name(iteration: int) -> str:
    """Return Megatron's folder name of a checkpoint."""
    return f"iter_{iteration:07d}"
