"""The layout of a DeepSpeed checkpoint, and how a run resumes from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_let.engines.deepspeed.checkpoint_info import (
    CheckpointInfo,
    is_universal,
    plan_resume,
    read_info,
    universal_folder,
    write_info,
)
from megatron_let.errors import LETError
from megatron_let.files.names import checkpoint_name


def checkpoint(folder: Path, stage: int, dp: int, tp: int) -> Path:
    folder.mkdir()
    write_info(folder, CheckpointInfo(5, stage, dp, tp))
    return folder


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_same_layout_resumes_the_checkpoint_itself(tmp_path: Path, stage: int) -> None:
    folder = checkpoint(tmp_path / checkpoint_name(5), stage, 2, 2)
    (universal_folder(folder) / "zero").mkdir(parents=True)
    assert plan_resume(folder, CheckpointInfo(0, stage, 2, 2)) == folder


@pytest.mark.parametrize(("stage", "universal"), [(0, False), (1, True), (2, True), (3, True)])
def test_other_number_of_replicas_resumes_the_universal_checkpoint(
    tmp_path: Path, stage: int, universal: bool
) -> None:
    folder = checkpoint(tmp_path / checkpoint_name(5), stage, 2, 1)
    (universal_folder(folder) / "zero").mkdir(parents=True)
    resume = plan_resume(folder, CheckpointInfo(0, stage, 4, 1))
    assert resume == (universal_folder(folder) if universal else folder)
    assert is_universal(resume) == universal


@pytest.mark.parametrize(
    ("saved", "now", "message"),
    [
        ((1, 2, 2), (1, 4, 1), "size 2 but the run has 1; give --tensor-model-parallel-size 2"),
        ((1, 2, 1), (2, 2, 1), "stage 1 but the run is of 2; set zero_optimization.stage to 1"),
        ((1, 2, 1), (1, 4, 1), "data-parallel size 2 but the run has 4; .*ds_to_universal"),
        ((3, 2, 2), (3, 4, 2), "resume on 2 replicas"),
    ],
)
def test_inexact_resume_is_refused(
    tmp_path: Path, saved: tuple[int, int, int], now: tuple[int, int, int], message: str
) -> None:
    folder = checkpoint(tmp_path / checkpoint_name(5), *saved)
    with pytest.raises(LETError, match=message):
        plan_resume(folder, CheckpointInfo(0, *now))


@pytest.mark.parametrize(
    ("text", "message"), [(None, "is not of --engine deepspeed"), ("{}", "is damaged")]
)
def test_folder_without_valid_info_is_refused(
    tmp_path: Path, text: str | None, message: str
) -> None:
    if text is not None:
        (tmp_path / "deepspeed.json").write_text(text)
    with pytest.raises(LETError, match=message):
        read_info(tmp_path)
