"""What a published number comes with: its command, date, machine and versions."""

from __future__ import annotations

import csv
import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any


def provenance(command: str) -> dict[str, str]:
    """What a number in a document must come with: command, date, machine and versions."""
    processor = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            processor = line.partition(":")[2].strip()
            break
    versions = {name: version(name) for name in ("torch", "megatron-core", "transformers")}
    return {
        "command": command,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "processor": f"{processor}, {len(os.sched_getaffinity(0))} cores",
        **versions,
    }


def write_csv(path: Path, rows: list[dict[str, Any]], source: dict[str, str]) -> None:
    """Write rows, each with its provenance, in one step."""
    partial = path.with_name("partial-" + path.name)
    with partial.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, [*rows[0], *source])
        writer.writeheader()
        writer.writerows([{**row, **source} for row in rows])
    partial.replace(path)
