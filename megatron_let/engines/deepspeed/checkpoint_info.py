"""The layout of a DeepSpeed checkpoint, and how a run may resume from it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_let.errors import LETError, first_line
from megatron_let.files.atomic import write_json

FILE_NAME = "deepspeed.json"


@dataclass(frozen=True)
class CheckpointInfo:
    """The layout of a run that saved a checkpoint, in the checkpoint's `deepspeed.json`.

    Attributes:
        iteration: number of steps taken.
        zero_stage: 0 to 3.
        data_parallel_size, tensor_parallel_size: numbers of ranks.
    """

    iteration: int
    zero_stage: int
    data_parallel_size: int
    tensor_parallel_size: int


def write_info(folder: Path, info: CheckpointInfo) -> None:
    """Write `deepspeed.json` into a checkpoint's folder."""
    write_json(folder / FILE_NAME, asdict(info))


def read_info(folder: Path) -> CheckpointInfo:
    """Read a checkpoint's `deepspeed.json`.

    Raises:
        LETError: the folder is not a checkpoint of the DeepSpeed engine, or is damaged.
    """
    file = folder / FILE_NAME
    if not file.is_file():
        raise LETError(
            f"The checkpoint {folder} is not of --engine deepspeed (it has no {FILE_NAME}); resume"
            " it with --engine megatron, or give another --load and --save."
        )
    try:
        return CheckpointInfo(**json.loads(file.read_text()))
    except (ValueError, TypeError) as error:
        raise LETError(
            f"{file} is damaged ({first_line(error)}); resume from an earlier checkpoint."
        ) from error


def refuse_deepspeed_checkpoint(folder: Path) -> None:
    """Refuse to load a DeepSpeed checkpoint with Megatron's engine.

    Raises:
        LETError: `folder` is a checkpoint of the DeepSpeed engine.
    """
    if (folder / FILE_NAME).is_file():
        raise LETError(
            f"The checkpoint {folder} is of --engine deepspeed; resume it with that engine, or give"
            " another --load and --save."
        )


def plan_resume(folder: Path, now: CheckpointInfo) -> Path:
    """Return the folder from which a run in the layout `now` resumes the checkpoint in `folder`.

    It is `folder`, or its universal form if the number of replicas is another one.

    Args:
        now: the run's layout; `iteration` is ignored.

    Raises:
        LETError: an exact resume is not possible; the message says what to do.
    """
    saved = read_info(folder)
    if saved.tensor_parallel_size != now.tensor_parallel_size:
        raise LETError(
            f"The checkpoint {folder} has tensor parallel size {saved.tensor_parallel_size} but"
            f" the run has {now.tensor_parallel_size}; give --tensor-model-parallel-size"
            f" {saved.tensor_parallel_size}."
        )
    if saved.zero_stage != now.zero_stage:
        raise LETError(
            f"The checkpoint {folder} is of ZeRO stage {saved.zero_stage} but the run is"
            f" of {now.zero_stage}; set zero_optimization.stage to {saved.zero_stage}."
        )
    if saved.zero_stage == 0 or saved.data_parallel_size == now.data_parallel_size:
        return folder
    replicas = saved.data_parallel_size
    sizes = f"data-parallel size {replicas} but the run has {now.data_parallel_size}"
    if saved.zero_stage == 3 and saved.tensor_parallel_size > 1:
        raise LETError(
            f"The checkpoint {folder} has {sizes}, and DeepSpeed's universal format lacks"
            " Megatron's tensor-parallel shards under ZeRO-3; resume on"
            f" {replicas} replicas."
        )
    universal = universal_folder(folder)
    if not is_universal(universal):
        raise LETError(
            f"The checkpoint {folder} has {sizes}; convert it with python -m"
            f" deepspeed.checkpoint.ds_to_universal --input_folder {folder} --output_folder"
            f" {universal}, and restart the run."
        )
    return universal


def universal_folder(folder: Path) -> Path:
    """Return the folder in which the universal form of a checkpoint is expected."""
    return folder.with_name(folder.name + "_universal")


def is_universal(folder: Path) -> bool:
    """Return whether a folder is a checkpoint in DeepSpeed's universal format."""
    return (folder / "zero").is_dir()
