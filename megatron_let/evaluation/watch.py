"""Find the checkpoints of a run while it is training."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

from megatron_let.checkpoint.torch_dist import FORMAT, INDEX
from megatron_let.files.names import DONE

_ITERATION = re.compile(r"iter_\d{7,}")


def finished_checkpoints(run: Path) -> list[Path]:
    """Return the complete checkpoints in the folder of a run, oldest first."""
    folders = [path for path in run.iterdir() if _ITERATION.fullmatch(path.name)]
    whole = [p for p in folders if (p / INDEX).is_file() and (p / FORMAT).is_file()]
    return sorted(whole, key=lambda path: int(path.name.removeprefix("iter_")))


def new_checkpoints(run: Path, interval_seconds: float) -> Iterator[list[Path]]:
    """Yield all complete checkpoints each time there are new ones, until the run is done."""
    seen: list[Path] = []
    while True:
        # Read before the checkpoints, so that the last one is not missed.
        done = (run / DONE).is_file()
        found = finished_checkpoints(run)
        if found != seen:
            seen = found
            yield found
        elif not done:
            time.sleep(interval_seconds)
        if done:
            return
