"""What every method with a teacher does around Megatron's forward-backward function."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch

from megatron_let.errors import LETError
from megatron_let.teacher.inspect import TeacherFolder


class TaughtForwardBackward(ABC):
    """Wraps the functions that `get_forward_backward_func` returns.

    A global batch of training goes to `_run_taught` while its weight is above 0, and to Megatron
    alone afterwards; the first of those frees the teacher.
    """

    def __init__(
        self,
        folder: TeacherFolder,
        current_step: Callable[[], int],
        report: Callable[[str], None],
    ) -> None:
        """
        Args:
            folder: the teacher's, already checked.
            current_step: 0-based training step.
            report: prints one line on one rank.
        """
        self._folder = folder
        self._current_step = current_step
        self._report = report

    def wrap_getter(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Stand in for `get_forward_backward_func`."""

        @functools.wraps(original)
        def getter(*args: Any, **kwargs: Any) -> Callable[..., Any]:
            return functools.partial(self.run, original(*args, **kwargs))

        return getter

    def run(self, forward_backward: Callable[..., Any], **kwargs: Any) -> Any:
        """Run one global batch; keyword arguments are those of Megatron's schedules."""
        if kwargs["forward_only"]:
            return forward_backward(**kwargs)
        step = self._current_step()
        weight = self._weight(step)
        if weight > 0:
            return self._run_taught(forward_backward, weight, kwargs)
        if self._release():
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()
            self._report(f"LET: the weight is 0 from step {step + 1} on; the teacher is freed")
        return forward_backward(**kwargs)

    @abstractmethod
    def _weight(self, step: int) -> float:
        """Of the teacher, at a 0-based step."""

    @abstractmethod
    def _run_taught(
        self, forward_backward: Callable[..., Any], weight: float, kwargs: dict[str, Any]
    ) -> Any:
        """Run a global batch with the teacher; its first call loads it."""

    @abstractmethod
    def _release(self) -> bool:
        """Let the teacher go; whether there was one on any rank."""

    def _refuse_failed(self, not_finite: torch.Tensor) -> None:
        """Raise on all ranks if any replica's teacher failed, so that none is left waiting."""
        if torch.distributed.get_world_size() > 1:
            torch.distributed.all_reduce(not_finite)
        failed = not_finite.nonzero()
        if len(failed):
            raise LETError(
                f"The teacher {self._folder.path} gave NaN or Inf in microbatch "
                f"{int(failed[0])} of step {self._current_step() + 1}; the step was not taken. "
                "Check its weights, or run it with --let-teacher-dtype fp32.",
                collective=True,
            )
