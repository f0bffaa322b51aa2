"""Small time series: `.ts` files that two classes tell apart, and settings of seconds."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml

from megatron_let.config.recipes import find_recipe, load_yaml

NAME = "Waves"


def ts_text(series: list[torch.Tensor], labels: list[str]) -> str:
    """Return the text of a `.ts` file of series `[s, channels]`."""
    lines = [
        ":".join([*(",".join(map(str, channel)) for channel in one.T.tolist()), label])
        for one, label in zip(series, labels, strict=True)
    ]
    header = ["# Waves", "@problemName Waves", "@univariate false", "@classLabel true low high"]
    return "\n".join([*header, "@data", *lines]) + "\n"


def write_waves(folder: Path, num_series: int = 12) -> Path:
    """Write the set `NAME`, sines of two frequencies with 6 to 11 steps; return `folder`."""
    generator = torch.Generator().manual_seed(0)
    (folder / NAME).mkdir(parents=True)
    for part in ("TRAIN", "TEST"):
        series, labels = [], []
        for number in range(num_series):
            steps = torch.arange(6 + number % 6)[:, None]
            phase = torch.rand(3, generator=generator)
            series.append(torch.sin(steps * (2.0 if number % 2 else 0.5) + phase) + phase)
            labels.append("high" if number % 2 else "low")
        (folder / NAME / f"{NAME}_{part}.ts").write_text(ts_text(series, labels))
    return folder


def small_settings(**student: object) -> dict[str, dict[str, object]]:
    """Return the packaged settings with small sizes, and changes to the section `student`."""
    settings: dict[str, dict[str, object]] = load_yaml(find_recipe(Path("time_series")))
    settings["teacher"] |= {
        "sets": [NAME], "channels": 4, "width": 6, "filters": 5, "frequencies": 2, "kernels": 2,
        "epochs": 2, "batch_size": 5,
    }  # fmt: skip
    settings["student"] |= {
        "sets": [NAME], "seeds": [1, 2], "layer": 2, "epochs": 2, "batch_size": 5,
        "stop_fraction": 0.5, **student,
    }  # fmt: skip
    return settings


def write_settings(path: Path, **student: object) -> Path:
    """Write `small_settings` to a file; return its path."""
    path.write_text(yaml.safe_dump(small_settings(**student)))
    return path
