"""The paper's nine tasks (its Table 1), and where their data lies."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_let.errors import LETError

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Task:
    """One column of the table.

    Attributes:
        column: the paper's heading.
        name: lm-eval's.
        file: its definition among lm-eval's.
        metric: the accuracy that goes into the table; the paper does not name it. Its values of
            OpenBookQA are those of the normalised accuracy, all others of the plain one.
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
    """The tasks of these names, all nine for None.

    Raises:
        LETError: an unknown name.
    """
    known = {task.name: task for task in TASKS}
    for name in names or ():
        if name not in known:
            raise LETError(f"The task {name!r} is none of {', '.join(known)}.")
    return tuple(known[name] for name in names) if names else TASKS


def local_data(task: Task, data: Path) -> dict[str, Any]:
    """Settings that turn lm-eval's own task into the same over local files.

    Args:
        data: folder with `NAME/SPLIT.jsonl`.

    Raises:
        LETError: the folder lacks the task.
    """
    files = {split: data / task.name / f"{split}.jsonl" for split in SPLITS}
    there = {split: str(path.resolve()) for split, path in files.items() if path.is_file()}
    if not there.keys() & {"validation", "test"}:
        raise LETError(
            f"The data folder {data} has no {task.name}/validation.jsonl; make it with"
            " tools/evaluate.py fetch."
        )
    splits = {"training_split": "train", "validation_split": "validation", "test_split": "test"}
    return {
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": there},
        **{key: split if split in there else None for key, split in splits.items()},
    }


def data_fingerprint(task: Task, data: Path | None) -> str:
    """Hash of a task's local files; `hub` where there are none."""
    if data is None:
        return "hub"
    digest = hashlib.sha256()
    for path in sorted((data / task.name).glob("*.jsonl")):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
