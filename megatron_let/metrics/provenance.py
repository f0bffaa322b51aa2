"""The source of a published number: command, date, machine and versions."""

import csv
import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_let.files.atomic import atomic_file


def provenance(command: str) -> dict[str, str]:
    """Return the command, the date, the processor and the versions of the main packages."""
    versions = {name: version(name) for name in ("torch", "megatron-core", "transformers")}
    return {
        "command": command,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "processor": f"{processor()}, {len(os.sched_getaffinity(0))} cores",
        **versions,
    }


def processor() -> str:
    """Return the name of the processor."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def write_csv(path: Path, rows: list[dict[str, Any]], source: dict[str, str]) -> None:
    """Write rows atomically, each followed by its provenance."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial, partial.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, [*rows[0], *source])
        writer.writeheader()
        writer.writerows([{**row, **source} for row in rows])
