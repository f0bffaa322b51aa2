"""Folders of runs that were never trained, with metrics whose figures are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SETTINGS = {"let_method": "none", "seed": 1, "lr": 1e-3, "train_iters": 40, "settings": {}}


def write_run(
    folder: Path,
    valid: dict[int, float],
    steps: int = 40,
    seconds: float = 2.0,
    teacher_steps: int = 0,
    settings: dict[str, Any] | None = None,
    downstream: float | None = None,
) -> Path:
    """Write a run of which a step takes `seconds`, and twice as long with the teacher."""
    (folder / "checkpoints").mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        aligned = step <= teacher_steps
        time = seconds * (2 if aligned else 1)
        row = {"iteration": step, "lm_loss": 5.0, "step_seconds": time,
               "tokens_per_second": 100 / time, "max_memory_bytes": step * 2**20}  # fmt: skip
        rows.append(row | ({"let_cosine": 0.5, "let_weight": 0.1} if aligned else {}))
        if step in valid:
            rows.append({"iteration": step, "valid_loss": valid[step]})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if settings is not None:
        (folder / "checkpoints" / "run.json").write_text(
            json.dumps(SETTINGS | {"let_metrics_path": str(folder)} | settings)
        )
    if downstream is not None:
        (folder / "evaluation").mkdir()
        models = [
            {"model": model, "tokens": tokens, "average": average, "results": []}
            for model, tokens, average in (
                (f"runs/{folder.name}/checkpoints/iter_0000010", 10, 1.0),
                (f"runs/{folder.name}/checkpoints/iter_0000020", 20, downstream),
                # Of another run that was evaluated together with this one.
                ("runs/other/checkpoints/iter_0000030", 30, 2.0),
            )
        ]
        (folder / "evaluation" / "results.json").write_text(json.dumps({"models": models}))
    return folder
