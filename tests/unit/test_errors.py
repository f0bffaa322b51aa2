"""Which ranks print an error, and how another package's exception becomes one."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from megatron.core.utils import get_attr_wrapped_model

from megatron_let.errors import (
    LETError,
    may_succeed_on_restart,
    print_error,
    refusal_by_another_package,
)


@pytest.mark.parametrize(
    ("initialized", "collective", "rank", "local_rank", "prints"),
    [
        (False, False, 0, 0, True),
        (False, False, 1, 1, False),
        (False, False, 8, 0, True),  # rank 0 of the second node
        (True, False, 1, 1, True),
        (True, True, 1, 1, False),
        (True, True, 8, 0, False),
        (True, True, 0, 0, True),
    ],
)
def test_error_is_printed_once_per_node_at_start_and_once_per_job_if_collective(
    initialized: bool,
    collective: bool,
    rank: int,
    local_rank: int,
    prints: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: initialized)
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    print_error(LETError("No.", collective))
    assert capsys.readouterr().err == (f"megatron_let: error (rank {rank}): No.\n" * prints)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.distributed.DistStoreError("timed out"), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("[gloo] Connection closed by peer"), True),
        (OSError(5, "Input/output error"), True),
        (TimeoutError("x"), True),
        (FileNotFoundError("x"), False),
        (AssertionError("x"), False),
        (ValueError("x"), False),
        (NotImplementedError("x"), False),
    ],
)
def test_error_that_may_be_gone_at_the_next_start(error: Exception, expected: bool) -> None:
    with pytest.raises(type(error)) as raised:
        raise error
    assert may_succeed_on_restart(raised.value) == expected


def test_error_that_megatron_raises_for_a_setting_comes_again() -> None:
    with pytest.raises(RuntimeError) as raised:
        get_attr_wrapped_model([], "config")
    assert not may_succeed_on_restart(raised.value)


def test_error_of_a_device_below_megatron_may_be_gone() -> None:
    # As torch raises it in C++, without a frame of its own.
    values: dict[str, object] = {"__name__": "megatron.training.training", "torch": torch}
    with pytest.raises(RuntimeError) as raised:
        exec(compile("torch.empty(-1)", "/x/megatron/training/training.py", "exec"), values)
    assert may_succeed_on_restart(raised.value)


def fail_with(message: str) -> None:
    raise ValueError(message)


def fail_an_assertion() -> None:
    steps = 3
    assert steps > 4


def refusal(fail: Callable[[], None]) -> LETError | None:
    try:
        fail()
    except Exception as error:
        return refusal_by_another_package(error)
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize(
    ("fail", "quoted"),
    [
        (lambda: fail_with("5 layers cannot be split.\nMore text"), "5 layers cannot be split ("),
        (lambda: fail_with(""), "ValueError"),
    ],
)
def test_exception_before_training_is_one_sentence_naming_the_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail: Callable[[], None], quoted: str
) -> None:
    monkeypatch.setenv("OUTPUT", str(tmp_path / "run"))
    monkeypatch.setenv("RANK", "3")
    error = refusal(fail)
    assert quoted in str(error) and "\n" not in str(error)
    named = re.search(r"the traceback is in (\S+)\)", str(error))
    assert named and named[1] == str(tmp_path / "run" / "error-rank3.log")
    assert "Traceback (most recent call last)" in Path(named[1]).read_text()


def test_assertion_without_a_message_is_quoted_by_its_source(tmp_path: Path) -> None:
    # In a file of its own, because pytest rewrites the assertions of tests.
    source = tmp_path / "checks.py"
    source.write_text("steps = 3\nassert steps > 4\n")
    found = refusal(lambda: exec(compile(source.read_text(), source, "exec"), {}))
    assert "assert steps > 4" in str(found) and "checks.py:2" in str(found)


def test_traceback_goes_to_the_temporary_folder_without_a_writable_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("OUTPUT", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert f"{tmp_path}/error-rank" in str(refusal(fail_an_assertion))


def test_traceback_gets_a_free_name_where_its_file_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OUTPUT", raising=False)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "error-rank0.log").mkdir()
    named = re.search(
        r"the traceback is in (\S+-error-rank0\.log)\)", str(refusal(fail_an_assertion))
    )
    assert named and "Traceback (most recent call last)" in Path(named[1]).read_text()


def test_exception_of_the_training_loop_keeps_its_traceback() -> None:
    # Code that looks like Megatron's loop to a traceback.
    source = "def train(step):\n    step()\n"
    scope: dict[str, Callable[[Callable[[], None]], None]] = {}
    exec(compile(source, "/site-packages/megatron/training/training.py", "exec"), scope)
    assert refusal(lambda: scope["train"](fail_an_assertion)) is None
