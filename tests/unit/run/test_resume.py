"""The step and the checkpoint that a run resumes from."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from megatron_let.errors import LETError
from megatron_let.files.names import TRACKER
from megatron_let.run.resume import check_loads_something, loaded_checkpoint, resumed_step

ELSEWHERE = {"non_persistent_ckpt_type": None, "pretrained_checkpoint": None}


def run_args(**values: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"load": None, "finetune": False, "ckpt_step": None} | values)


@pytest.mark.parametrize(
    ("values", "expected"),
    [({}, 40), ({"finetune": True}, 0), ({"load": None}, 0), ({"ckpt_step": 20}, 20)],
)
def test_resumed_step_follows_tracker_and_flags(
    values: dict[str, Any], expected: int, tmp_path: Path
) -> None:
    (tmp_path / TRACKER).write_text("40")
    assert resumed_step(run_args(**{"load": str(tmp_path), **values})) == expected


@pytest.mark.parametrize("content", [None, "release", ""])
def test_resumed_step_of_folder_without_iteration_is_0(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / TRACKER).write_text(content)
    assert resumed_step(run_args(load=str(tmp_path))) == 0


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"load": "/runs/a", "iteration": 40}, Path("/runs/a/iter_0000040")),
        ({"load": "/runs/a", "iteration": 0}, None),
        ({"load": "/runs/a", "iteration": 40, "finetune": True}, None),
        ({"load": None, "iteration": 0}, None),
    ],
)
def test_loaded_checkpoint_is_none_unless_resumed(
    values: dict[str, Any], expected: Path | None
) -> None:
    assert loaded_checkpoint(run_args(**values)) == expected


@pytest.mark.parametrize("values", [{"finetune": True}, {"save": None}, {"save": "elsewhere"}])
def test_load_without_a_checkpoint_raises_error(tmp_path: Path, values: dict[str, Any]) -> None:
    nothing = {"save": str(tmp_path), "load": str(tmp_path), **ELSEWHERE}
    with pytest.raises(LETError, match=f"--load {tmp_path} has no checkpoint"):
        check_loads_something(run_args(**nothing | values))


@pytest.mark.parametrize(
    "values",
    [{"load": None}, {}, {"finetune": True, "tracker": "5"}, {"save": None, "tracker": "release"}],
)
def test_own_folder_and_folder_with_a_checkpoint_may_be_loaded(
    tmp_path: Path, values: dict[str, Any]
) -> None:
    if tracker := values.pop("tracker", None):
        (tmp_path / TRACKER).write_text(tracker)
    # The same folder by another path.
    own = {"save": str(tmp_path / "x" / ".."), "load": str(tmp_path), **ELSEWHERE}
    check_loads_something(run_args(**own | values))
