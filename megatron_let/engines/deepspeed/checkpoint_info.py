"""What a DeepSpeed checkpoint says about itself, and how a run may resume from it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_let.errors import LETError, first_line

FILE_NAME = "deepspeed.json"


@dataclass(frozen=True)
class CheckpointInfo:
    """The layout that a checkpoint was saved in, in its folder's `deepspeed.json`.

    Attributes:
        iteration: steps taken.
        zero_stage: 0 to 3.
        data_parallel_size, tensor_parallel_size: ranks.
    """

    iteration: int
    zero_stage: int
    data_parallel_size: int
    tensor_parallel_size: int


@dataclass(frozen=True)
class Resume:
    """Where a run begins.

    Attributes:
        folder: the checkpoint's.
        universal: it is in DeepSpeed's universal format.
    """

    folder: Path
    universal: bool


def write_info(folder: Path, info: CheckpointInfo) -> None:
    """Write `deepspeed.json` into a checkpoint's folder."""
    (folder / FILE_NAME).write_text(json.dumps(asdict(info)) + "\n")


def read_info(folder: Path) -> CheckpointInfo:
    """Read a checkpoint's `deepspeed.json`.

    Raises:
        LETError: it is no checkpoint of the DeepSpeed engine, or damaged.
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
            f"{file} is damaged ({first_line(error)}); resume an earlier one."
        ) from error


def refuse_deepspeeds(folder: Path) -> None:
    """Refuse a DeepSpeed checkpoint under Megatron's engine.

    Raises:
        LETError: `folder` is one.
    """
    if (folder / FILE_NAME).is_file():
        raise LETError(
            f"The checkpoint {folder} is of --engine deepspeed; resume it with that, or give"
            " another --load and --save."
        )


def plan_resume(folder: Path, now: CheckpointInfo, universal_exists: bool) -> Resume:
    """Decide how a run in the layout `now` loads the checkpoint in `folder`.

    Args:
        folder: the checkpoint's, with its `deepspeed.json`.
        now: the run's layout; `iteration` is not looked at.
        universal_exists: `folder` was converted to the universal format beside it.

    Raises:
        LETError: no exact resume is possible; says what to do.
    """
    saved = read_info(folder)
    if saved.tensor_parallel_size != now.tensor_parallel_size:
        raise LETError(
            f"The checkpoint {folder} has tensor parallel size {saved.tensor_parallel_size} but"
            f" the run {now.tensor_parallel_size}; give --tensor-model-parallel-size"
            f" {saved.tensor_parallel_size}."
        )
    if saved.zero_stage != now.zero_stage:
        raise LETError(
            f"The checkpoint {folder} is of ZeRO stage {saved.zero_stage} but the run of"
            f" {now.zero_stage}; set zero_optimization.stage to {saved.zero_stage}."
        )
    if saved.zero_stage == 0 or saved.data_parallel_size == now.data_parallel_size:
        return Resume(folder, universal=False)
    sizes = f"data-parallel size {saved.data_parallel_size} but the run {now.data_parallel_size}"
    if saved.zero_stage == 3 and saved.tensor_parallel_size > 1:
        raise LETError(
            f"The checkpoint {folder} has {sizes}, and DeepSpeed's universal format does not know"
            " Megatron's tensor-parallel shards under ZeRO-3; resume on"
            f" {saved.data_parallel_size} replicas."
        )
    universal = universal_folder(folder)
    if not universal_exists:
        raise LETError(
            f"The checkpoint {folder} has {sizes}; convert it by python -m"
            f" deepspeed.checkpoint.ds_to_universal --input_folder {folder} --output_folder"
            f" {universal}, and start the run again."
        )
    return Resume(universal, universal=True)


def universal_folder(folder: Path) -> Path:
    """Where the universal form of a checkpoint is looked for."""
    return folder.with_name(folder.name + "_universal")
