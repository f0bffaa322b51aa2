"""The nine tasks of the paper's Table 1, and their local data."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_let.errors import LETError

_SPLITS = {"training_split": "train", "validation_split": "validation", "test_split": "test"}


@dataclass(frozen=True)
class Task:
    """One column of the table.

    Attributes:
        column: the paper's heading.
        name: lm-eval's name.
        file: its definition, relative to lm-eval's tasks.
        metric: accuracy in the table. The paper does not name it; its values for OpenBookQA fit
            normalised accuracy, all others plain accuracy.
    """

    column: str
    name: str
    file: str
    metric: str = "acc"


TASKS = (
    Task("ARC-c", "arc_challenge", "arc/arc_challenge.yaml"),
    Task("ARC-e", "arc_easy", "arc/arc_easy.yaml"),
    Task("HS", "hellaswag", "hellaswag/hellaswag.yaml"),
    Task("LAMB", "lambada_openai", "lambada/lambada_openai.yaml"),
    Task("OBQA", "openbookqa", "openbookqa/openbookqa.yaml", "acc_norm"),
    Task("PIQA", "piqa", "piqa/piqa.yaml"),
    Task("SciQ", "sciq", "sciq/sciq.yaml"),
    Task("Wino.", "winogrande", "winogrande/default.yaml"),
    Task("BoolQ", "boolq", "super_glue/boolq/default.yaml"),
)


def tasks_named(names: list[str] | None) -> tuple[Task, ...]:
    """Return the tasks with these names, each once, or all nine for None.

    Raises:
        LETError: an unknown name.
    """
    known = {task.name: task for task in TASKS}
    for name in names or ():
        if name not in known:
            raise LETError(f"The task {name!r} is unknown; give one of {', '.join(known)}.")
    return tuple(known[name] for name in dict.fromkeys(names)) if names else TASKS


def local_data(task: Task, data: Path) -> dict[str, Any]:
    """Return the settings that make lm-eval's task read `NAME/SPLIT.jsonl` in the folder `data`.

    Raises:
        LETError: the folder has no validation or test split of the task.
    """
    files = {split: data / task.name / f"{split}.jsonl" for split in _SPLITS.values()}
    found = {split: str(path.resolve()) for split, path in files.items() if path.is_file()}
    if not found.keys() & {"validation", "test"}:
        raise LETError(
            f"The data folder {data} has no {task.name}/validation.jsonl; make it with"
            " tools/evaluate.py fetch."
        )
    return {
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": found},
        **{key: split if split in found else None for key, split in _SPLITS.items()},
    }


def data_fingerprint(task: Task, data: Path | None) -> str:
    """Return a hash of the local files of a task, or `hub` for data from the hub."""
    if data is None:
        return "hub"
    digest = hashlib.sha256()
    for path in sorted((data / task.name).glob("*.jsonl")):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
