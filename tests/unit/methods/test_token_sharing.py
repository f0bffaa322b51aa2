"""The tokens of a batch arrive on the stages that run the teacher, and nowhere else."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core import parallel_state

from megatron_let.methods.global_batch import TokenSharing
from tests.helpers.runs import call_ranks

pytestmark = pytest.mark.medium

BATCH = [
    {"tokens": torch.arange(6).view(2, 3) + 6 * m, "loss_mask": torch.ones(2, 3)} for m in range(2)
]
AHEAD = torch.arange(12, 18).view(1, 2, 3)
TOKENS = torch.arange(12).view(2, 2, 3)
CPU = torch.device("cpu")
FUNCTIONS = ("broadcast", "send", "recv", "all_reduce")


def share_in_a_pipeline() -> None:
    """Two stages of two tensor-parallel ranks; the teacher on one of the stages, or on both."""
    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(2, pipeline_model_parallel_size=2)
    stage = parallel_state.get_pipeline_model_parallel_rank()
    is_first = parallel_state.get_tensor_model_parallel_rank() == 0
    for teacher_stage in (0, 1, None):
        batch, calls = share(teacher_stage)
        has_teacher = teacher_stage in (stage, None)
        assert batch.tokens.shape == TOKENS.shape
        assert not has_teacher or torch.equal(batch.tokens, TOKENS)
        assert batch.unmasked_tokens == (12 if has_teacher else None)
        hops = {"send", "recv"} & set(calls)
        assert hops == ({("send", "recv")[stage]} if is_first and teacher_stage == 1 else set())
        assert ("broadcast" in calls) == has_teacher
        if teacher_stage is None:
            assert batch.next_tokens is not None and torch.equal(batch.next_tokens, AHEAD)
        else:
            assert batch.next_tokens is None


def share(teacher_stage: int | None) -> tuple[Any, list[str]]:
    """Share a batch; return it, and the communication of this rank."""
    folder: Any = SimpleNamespace(vocab_size=18)
    sharing = TokenSharing(folder, None, CPU, teacher_stage)
    reads = torch.distributed.get_rank() == 0
    ahead, num_ahead = (AHEAD, 1) if teacher_stage is None else (None, 0)
    calls: list[str] = []
    with mock.patch.multiple(
        torch.distributed, **{name: logged(name, calls) for name in FUNCTIONS}
    ):
        shape = (2, 2, 3)
        batch = sharing.share(
            BATCH if reads else None, ahead if reads else None, shape, num_ahead, True
        )
    return batch, calls


def logged(name: str, calls: list[str]) -> Any:
    function = getattr(torch.distributed, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return function(*args, **kwargs)

    return call


def test_tokens_arrive_only_on_stages_with_a_teacher() -> None:
    call_ranks(share_in_a_pipeline, ranks=4)
