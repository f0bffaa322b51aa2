"""A global batch under LET: Megatron's forward-backward function with the alignment around it."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.utils import get_model_config, unwrap_model

from megatron_let.alignment.hook import AlignmentHook
from megatron_let.alignment.schedule import alignment_weight
from megatron_let.alignment.sharding import (
    SequenceShard,
    gradient_denominator,
    per_token_gradient_factor,
)
from megatron_let.config import LETConfig, LETError
from megatron_let.global_batch import GlobalBatch, read_ahead, share_tokens
from megatron_let.metrics import COSINE_KEY, WEIGHT_KEY
from megatron_let.teacher.folder import TeacherFolder
from megatron_let.teacher.model import Sharding, load_teacher
from megatron_let.teacher.states import AlignedStageStates

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Attachment:
    """The teacher and the hook, on a rank whose stage owns layer k."""

    hook: AlignmentHook
    states: AlignedStageStates


def owned_layer(model: list[torch.nn.Module], layer_number: int) -> torch.nn.Module | None:
    """The transformer layer with this global 1-based number, or None on another stage."""
    for chunk in unwrap_model(model):
        for layer in chunk.decoder.layers:
            if layer.layer_number == layer_number:
                return layer
    return None


class AlignedForwardBackward:
    """Wraps the functions that `get_forward_backward_func` returns.

    The teacher is loaded at the first step whose weight is above 0, so a run resumed at or past
    S_stop never loads it, and dropped at the first step whose weight is 0.
    """

    def __init__(
        self,
        config: LETConfig,
        folder: TeacherFolder,
        current_step: Callable[[], int],
        report: Callable[[str], None],
        sharding: Sharding | None = None,
    ) -> None:
        """
        Args:
            config: with `method` other than none.
            folder: the teacher's, already checked.
            current_step: 0-based training step.
            report: prints one line on one rank.
            sharding: see `load_teacher`.
        """
        self._config = config
        self._folder = folder
        self._current_step = current_step
        self._report = report
        self._sharding = sharding
        self._started = False
        self._attachment: _Attachment | None = None

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
        weight = alignment_weight(step, self._config.weight, self._config.stop_step)
        if weight == 0:
            self._release(step)
            return forward_backward(**kwargs)
        return self._run_aligned(forward_backward, weight, kwargs)

    def _run_aligned(
        self, forward_backward: Callable[..., Any], weight: float, kwargs: dict[str, Any]
    ) -> Any:
        model, num_microbatches = kwargs["model"], kwargs["num_microbatches"]
        shape = (kwargs["micro_batch_size"], kwargs["seq_length"])
        device = next(model[0].parameters()).device
        if not self._started:
            self._attach(model, device)
        kwargs["data_iterator"], microbatches = read_ahead(
            kwargs["data_iterator"], num_microbatches
        )
        per_token = get_model_config(model[0]).calculate_per_token_loss
        batch = share_tokens(
            microbatches, num_microbatches, shape, self._folder.vocab_size, device, per_token
        )
        if self._attachment is not None:
            scale = _gradient_scale(get_model_config(model[0]), weight, batch)
            self._attachment.states.begin(batch.tokens)
            self._attachment.hook.open_step(self._attachment.states.state, scale, device)
        losses = forward_backward(**kwargs)
        cosine = self._close(num_microbatches, device)
        return _with_metrics(losses, cosine, weight)

    def _attach(self, model: list[torch.nn.Module], device: torch.device) -> None:
        self._started = True
        layer = owned_layer(model, self._config.layer)
        if layer is None:
            return
        teacher = load_teacher(self._folder, self._config, device, self._sharding)
        self._attachment = _Attachment(
            AlignmentHook(layer), AlignedStageStates(teacher, _this_rank(layer.config))
        )
        logger.info(
            "LET: teacher %s (%.0f MiB) on the stage of layer %d",
            self._folder.path,
            teacher.num_bytes / 2**20,
            self._config.layer,
        )

    def _close(self, num_microbatches: int, device: torch.device) -> torch.Tensor:
        """Return [cosine sum, tokens] of this replica on all of its ranks.

        Raises:
            LETError: the teacher gave NaN or Inf; raised before the optimizer's step.
        """
        totals = torch.zeros(2 + num_microbatches, device=device)
        if self._attachment is not None:
            cosine_sum, num_tokens = self._attachment.hook.close_step()
            not_finite = self._attachment.states.end()
            if _counts_tokens(self._attachment):
                totals[0], totals[1] = cosine_sum, num_tokens
            totals[2:] = not_finite
        group = parallel_state.get_model_parallel_group()
        if group.size() > 1:
            torch.distributed.all_reduce(totals, group=group)
        self._refuse_failed(totals[2:])
        return totals[:2]

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

    def _release(self, step: int) -> None:
        """Free the teacher and its buffers."""
        if self._attachment is not None:
            self._attachment.hook.remove()
            self._attachment = None
            if self._sharding is not None:
                self._sharding.free()
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()
        if self._started:
            self._report(f"LET: the weight is 0 from step {step + 1} on; the teacher is freed")
            self._started = False


def _this_rank(config: Any) -> SequenceShard:
    return SequenceShard(
        cp_size=parallel_state.get_context_parallel_world_size(),
        cp_rank=parallel_state.get_context_parallel_rank(),
        sp_size=config.tensor_model_parallel_size if config.sequence_parallel else 1,
        sp_rank=parallel_state.get_tensor_model_parallel_rank() if config.sequence_parallel else 0,
    )


def _counts_tokens(attachment: _Attachment) -> bool:
    # Without sequence parallelism every tensor-parallel rank holds the same tokens.
    return attachment.states.shard.sp_size > 1 or (
        parallel_state.get_tensor_model_parallel_rank() == 0
    )


def _gradient_scale(config: Any, weight: float, batch: GlobalBatch) -> float | torch.Tensor:
    """Factor of d(-sum of local cosines)/dh, from Megatron's own scaling of the loss."""
    num_microbatches, micro_batch_size, sequence_length = batch.tokens.shape
    if batch.unmasked_tokens is not None:
        replicas = parallel_state.get_data_parallel_world_size()
        factor = per_token_gradient_factor(batch.unmasked_tokens, batch.tokens.numel() * replicas)
    else:
        factor = 1 / gradient_denominator(
            micro_batch_size,
            sequence_length,
            parallel_state.get_context_parallel_world_size(),
            num_microbatches,
        )
    if config.grad_scale_func is None:
        return weight * factor
    one = torch.ones((), dtype=torch.float32, device=batch.tokens.device)
    return config.grad_scale_func(one).view(()) * (weight * factor)


def _with_metrics(losses: Any, cosine: torch.Tensor, weight: float) -> Any:
    """Add the cosine and the weight to what the last stage reports for each microbatch.

    Megatron sums [numerator, denominator] pairs over microbatches and DP x CP ranks, and averages
    single elements over microbatches.
    """
    for index, report in enumerate(losses):
        report[COSINE_KEY] = cosine if index == 0 else torch.zeros_like(cosine)
        report[WEIGHT_KEY] = cosine.new_tensor([weight])
    return losses
