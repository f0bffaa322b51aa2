"""Base class of methods that train with a teacher."""

from __future__ import annotations

import functools
import gc
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.utils import unwrap_model

from megatron_let.config.hybrid_pattern import last_entry
from megatron_let.config.let_config import LETConfig
from megatron_let.errors import LETError
from megatron_let.metrics.write import WEIGHT_KEY
from megatron_let.teacher.documents import Documents
from megatron_let.teacher.inspect import TeacherFolder
from megatron_let.teacher.model import Sharding

ForwardBackward = Callable[..., Any]


@dataclass(frozen=True)
class TrainingRun:
    """Run settings and callbacks passed to a method.

    Attributes:
        config: the method and its settings.
        folder: folder of the teacher, already checked.
        vocab_size: size of the student's vocabulary, without padding.
        num_steps: training steps of the run.
        current_step: returns the 0-based training step.
        loaded_checkpoint: returns, after the set-up, the folder of the checkpoint that the run
            resumes from; None in a new run.
        report: prints one line on one rank.
        teacher_length: tokens per sample under the teacher's tokenizer with
            `--let-cross-tokenizer`; None without it.
        sharding: spreads the teacher over ranks; None copies it.
        documents: borders within the teacher's rows; None if a row is one sequence.
    """

    config: LETConfig
    folder: TeacherFolder
    vocab_size: int
    seed: int
    num_steps: int
    current_step: Callable[[], int]
    loaded_checkpoint: Callable[[], Path | None]
    report: Callable[[str], None]
    teacher_length: int | None = None
    sharding: Sharding | None = None
    documents: Documents | None = None


class TeacherMethod(ABC):
    """Runs global batches with a teacher in them.

    A training batch whose weight is above 0 goes to `run_with_teacher`; others go to Megatron
    unchanged, and the first of them frees the teacher.
    """

    def __init__(self, run: TrainingRun) -> None:
        self._run = run
        self._config = run.config

    @property
    def _teacher_name(self) -> str:
        return f"{self._config.teacher} (width {self._run.folder.hidden_size})"

    @abstractmethod
    def weight(self, step: int) -> float:
        """Return the weight of the teacher's loss at `step` (0-based)."""

    @abstractmethod
    def describe(self) -> str:
        """Return one line for the log: method, teacher, weight and last step."""

    @abstractmethod
    def run_with_teacher(
        self, forward_backward: ForwardBackward, weight: float, kwargs: dict[str, Any]
    ) -> Any:
        """Run one global batch with the teacher; the first call loads it.

        Args:
            weight: weight of the teacher's loss at this step, above 0.
            kwargs: arguments of `forward_backward`; may be changed.

        Returns:
            What `forward_backward` returns: one dict of reported values per microbatch.
        """

    @abstractmethod
    def release(self) -> bool:
        """Free the teacher; return whether any rank had one."""

    def wrappers(self) -> dict[str, Callable[[Any], Any]]:
        """Map the targets in the patch table that the method needs to their wrappers."""
        return {"megatron.training.training:get_forward_backward_func": self.wrap_getter}

    def wrap_getter(self, original: Callable[..., ForwardBackward]) -> Callable[..., Any]:
        """Wrap `get_forward_backward_func`, so that `run` calls the function that it returns."""

        @functools.wraps(original)
        def getter(*args: Any, **kwargs: Any) -> ForwardBackward:
            return functools.partial(self.run, original(*args, **kwargs))

        return getter

    def run(self, forward_backward: ForwardBackward, **kwargs: Any) -> Any:
        """Run one global batch; keyword arguments are those of Megatron's schedules."""
        if kwargs["forward_only"]:
            return forward_backward(**kwargs)
        step = self._run.current_step()
        weight = self.weight(step)
        if weight > 0:
            return self.run_with_teacher(forward_backward, weight, kwargs)
        if self.release():
            if torch.cuda.is_initialized():
                # torch.compile keeps weights in reference cycles.
                gc.collect()
                torch.cuda.empty_cache()
            self._run.report(f"LET: the weight is 0 from step {step + 1} on; the teacher is freed")
        return forward_backward(**kwargs)

    def _reduce(self, sums: torch.Tensor, not_finite: torch.Tensor) -> torch.Tensor:
        """Sum over the model-parallel ranks of this replica, before the optimizer's step.

        Args:
            not_finite: [num_microbatches], above 0 where this rank's teacher gave NaN or Inf.

        Returns:
            `sums` over the ranks.

        Raises:
            LETError: the teacher of any replica gave NaN or Inf; raised on all ranks, so that
                none hangs.
        """
        totals = torch.cat([sums, not_finite])
        group = parallel_state.get_model_parallel_group()
        if group.size() > 1:
            torch.distributed.all_reduce(totals, group=group)
        totals, counts = totals.tensor_split([len(sums)])
        if torch.distributed.get_world_size() > 1:
            torch.distributed.all_reduce(counts)
        failed = counts.nonzero()
        if len(failed):
            raise LETError(
                f"The teacher {self._run.folder.path} gave NaN or Inf in microbatch "
                f"{int(failed[0])} of step {self._run.current_step() + 1}; the step was not taken. "
                "Check its weights, or run it with --let-teacher-dtype fp32.",
                collective=True,
            )
        return totals


def add_metrics(losses: Any, means: dict[str, torch.Tensor], weight: float) -> Any:
    """Add a method's values to the report of each microbatch on the last stage.

    Megatron sums [numerator, denominator] pairs over microbatches and DP x CP ranks, and averages
    single elements over microbatches.

    Args:
        losses: dicts that Megatron's forward-backward function returned; empty on other stages.
        means: [numerator, denominator] over the global batch of this replica, by key.
    """
    for index, report in enumerate(losses):
        for key, pair in means.items():
            report[key] = pair if index == 0 else torch.zeros_like(pair)
            report[WEIGHT_KEY] = pair.new_tensor([weight])
    return losses


def unwrap_chunks(model: list[torch.nn.Module]) -> list[Any]:
    """Return the model chunks below every wrapper.

    Megatron's `unwrap_model` stops at the inner one of Megatron-FSDP's two wrappers.
    """
    return unwrap_model([getattr(chunk, "module", chunk) for chunk in unwrap_model(model)])


def teacher_group(on_all_stages: bool) -> torch.distributed.ProcessGroup:
    """Return the existing group of the ranks that hold the teacher, on such a rank.

    Args:
        on_all_stages: every rank of the job holds it; if not, those of this pipeline stage.
    """
    if on_all_stages or parallel_state.get_pipeline_model_parallel_world_size() == 1:
        world = torch.distributed.group.WORLD
        assert world is not None, "torch.distributed is not initialised"
        return world
    return parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)


def find_layer(
    model: list[torch.nn.Module], layer_number: int
) -> tuple[int, torch.nn.Module] | None:
    """Return the model chunk and the module whose output is the state after layer k.

    It is a transformer layer, or the last entry of the layer in a HybridModel. None if it is on
    another pipeline stage.

    Args:
        layer_number: k, global and 1-based.
    """
    for index, chunk in enumerate(unwrap_chunks(model)):
        number = last_entry(layer_number, getattr(chunk, "hybrid_layer_pattern", None))
        for layer in chunk.decoder.layers:
            if layer.layer_number == number:
                return index, layer
    return None
