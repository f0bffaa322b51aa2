"""A global batch under LET: Megatron's forward-backward function with the alignment around it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.utils import get_model_config

from megatron_let.config.let_config import LETConfig
from megatron_let.losses import load_loss
from megatron_let.methods.base import TaughtForwardBackward
from megatron_let.methods.global_batch import GlobalBatch, peek, read_ahead
from megatron_let.methods.let_context import Attachment, attach
from megatron_let.methods.projection_training import ProjectionTraining
from megatron_let.methods.schedules import alignment_weight
from megatron_let.metrics.write import WEIGHT_KEY, alignment_key
from megatron_let.placement.plan import Plan
from megatron_let.placement.scheduler import PassTimes
from megatron_let.placement.sequence_shard import gradient_denominator, per_token_gradient_factor
from megatron_let.placement.state_buffer import PlacedStates
from megatron_let.teacher.inspect import TeacherFolder
from megatron_let.teacher.model import Sharding


class AlignedForwardBackward(TaughtForwardBackward):
    """Trains with LET.

    The teacher is loaded at the first step whose weight is above 0, so a run resumed at or past
    S_stop never loads it, and dropped at the first step whose weight is 0.
    """

    def __init__(
        self,
        config: LETConfig,
        folder: TeacherFolder,
        current_step: Callable[[], int],
        num_steps: int,
        report: Callable[[str], None],
        sharding: Sharding | None = None,
        projection: ProjectionTraining | None = None,
    ) -> None:
        """
        Args:
            config: with `method` other than none.
            folder: the teacher's, already checked.
            current_step: 0-based training step.
            num_steps: of the run.
            report: prints one line on one rank.
            sharding: see `load_teacher`.
            projection: where it is learned.
        """
        super().__init__(folder, current_step, report)
        self._config = config
        self._loss_names = load_loss(config.loss, None).names
        self._num_steps = num_steps
        self._sharding = sharding
        self._projection = projection
        self._attachment: Attachment | None = None

    def _is_aligned(self, step: int) -> bool:
        """Whether the run takes this step, and with a weight above 0."""
        return step < self._num_steps and self._weight(step) > 0

    def _weight(self, step: int) -> float:
        return alignment_weight(step, self._config.weight, self._config.stop_step)

    def _run_taught(
        self, forward_backward: Callable[..., Any], weight: float, kwargs: dict[str, Any]
    ) -> Any:
        model, num_microbatches = kwargs["model"], kwargs["num_microbatches"]
        shape = (num_microbatches, kwargs["micro_batch_size"], kwargs["seq_length"])
        if self._attachment is None:
            self._attachment = self._attach(model, shape)
        attachment = self._attachment
        batch = self._read(attachment, shape, kwargs)
        plan = _begin(attachment, batch)
        config = get_model_config(model[0])
        if attachment.hook is not None:
            scale = _gradient_scale(config, weight, batch)
            attachment.hook.open_step(attachment.states, scale, batch.tokens.device)
        if self._projection is not None:
            self._projection.open_step(weight, _num_tokens(batch))
        timer = attachment.placer.timer(batch.tokens.device)
        _before_schedule(attachment, plan, model, timer)
        kwargs["forward_step_func"] = _counted(
            kwargs["forward_step_func"], attachment.states, timer
        )
        with _before_finalizing(config, attachment.states.after_backward):
            losses = forward_backward(**kwargs)
        totals = self._close(attachment, num_microbatches, batch.tokens.device)
        attachment.placer.end_step(timer, attachment.stage, num_microbatches)
        return _with_metrics(losses, self._loss_names, totals, weight)

    def _attach(self, model: list[torch.nn.Module], shape: tuple[int, int, int]) -> Attachment:
        module = None if self._projection is None else self._projection.module
        return attach(
            self._config, self._folder, model, shape, self._report, self._sharding, module
        )

    def _read(
        self, attachment: Attachment, shape: tuple[int, int, int], kwargs: dict[str, Any]
    ) -> GlobalBatch:
        """Take the global batch from the data, and look at what the plan needs of the next one."""
        iterators, num_microbatches = kwargs["data_iterator"], shape[0]
        kwargs["data_iterator"], microbatches = read_ahead(iterators, num_microbatches)
        num_ahead = 0
        if self._is_aligned(self._current_step() + 1):
            num_ahead = attachment.placer.plan(num_microbatches, 0, True).num_ahead
        ahead = None
        # The last stage reads data too, but none of the teacher's tokens.
        if parallel_state.get_model_parallel_group().rank() == 0:
            ahead = peek(iterators, num_ahead, attachment.tokens.key)
        per_token = get_model_config(kwargs["model"][0]).calculate_per_token_loss
        return attachment.tokens.share(microbatches, ahead, shape, num_ahead, per_token)

    def _close(
        self, attachment: Attachment, num_microbatches: int, device: torch.device
    ) -> torch.Tensor:
        """Return the alignment's sums and the tokens of this replica on all of its ranks.

        Raises:
            LETError: the teacher gave NaN or Inf; raised before the optimizer's step.
        """
        num_sums = len(self._loss_names)
        totals = torch.zeros(num_sums + 1 + num_microbatches, device=device)
        if attachment.hook is not None:
            sums, num_tokens = attachment.hook.close_step()
            if attachment.counts_tokens:
                totals[:num_sums], totals[num_sums] = sums, num_tokens
        totals[num_sums + 1 :] = attachment.states.end()
        group = parallel_state.get_model_parallel_group()
        if group.size() > 1:
            torch.distributed.all_reduce(totals, group=group)
        self._refuse_failed(totals[num_sums + 1 :])
        return totals[: num_sums + 1]

    def _release(self) -> bool:
        """Free the teacher and its buffers, and a projection whose last step was not taken."""
        if self._projection is not None:
            self._projection.free()
        if self._attachment is None:
            return False
        self._attachment.close()
        self._attachment = None
        if self._sharding is not None:
            self._sharding.free()
        return True


def _begin(attachment: Attachment, batch: GlobalBatch) -> Plan:
    """Hand the tokens to the states, with a plan of what is still to be computed."""
    states, placer = attachment.states, attachment.placer
    num_microbatches = len(batch.tokens)
    num_ready = states.num_computed_ahead if batch.begins_with_shared else 0
    plan = placer.plan(num_microbatches, num_ready, batch.next_tokens is not None)
    states.begin(batch.tokens, plan, placer.max_prefetch(num_microbatches), batch.next_tokens)
    return plan


def _before_schedule(
    attachment: Attachment, plan: Plan, model: list[torch.nn.Module], timer: PassTimes | None
) -> None:
    """Run the teacher's work that comes before the schedule."""
    num_microbatches = len(plan.stages[attachment.stage].before)
    if num_microbatches:
        _start_param_gather(model[0])
    if timer is None:
        attachment.states.before_schedule()
    else:
        timer.time_teacher(attachment.states.before_schedule, num_microbatches)


def _start_param_gather(chunk: Any) -> None:
    """Let the parameters of the first layers be gathered while the teacher runs.

    Megatron starts it (`--overlap-param-gather`) in the first forward pass, which waits for it.
    """
    # Without these hooks, as in the first step, nobody would wait for it.
    if not getattr(chunk, "remove_forward_pre_hook_handles", None):
        return
    if chunk.overlap_param_gather_with_optimizer_step or not chunk.bucket_groups:
        return
    first = chunk.bucket_groups[-1]
    if not first.param_gather_dispatched:
        first.start_param_sync()


def _counted(
    forward_step: Callable[..., Any], states: PlacedStates, timer: PassTimes | None
) -> Callable[..., Any]:
    """A forward step that tells the states when it has run."""

    @functools.wraps(forward_step)
    def counted(*args: Any) -> Any:
        result = timer.time_forward(forward_step, *args) if timer else forward_step(*args)
        states.after_forward()
        return result

    return counted


@contextmanager
def _before_finalizing(config: Any, work: Callable[[], None]) -> Iterator[None]:
    """Run `work` after the schedule's last backward and before the gradients are finalized."""
    finalize = config.finalize_model_grads_func
    if finalize is None:
        yield
        work()
        return

    @functools.wraps(finalize)
    def work_and_finalize(*args: Any, **kwargs: Any) -> Any:
        work()
        return finalize(*args, **kwargs)

    config.finalize_model_grads_func = work_and_finalize
    try:
        yield
    finally:
        config.finalize_model_grads_func = finalize


def _gradient_scale(config: Any, weight: float, batch: GlobalBatch) -> float | torch.Tensor:
    """Factor of d(sum of local losses)/dh, from Megatron's own scaling of the loss."""
    num_microbatches, micro_batch_size, _ = batch.tokens.shape
    if batch.unmasked_tokens is not None:
        factor = per_token_gradient_factor(batch.unmasked_tokens, _num_tokens(batch))
    else:
        factor = 1 / gradient_denominator(
            micro_batch_size,
            batch.sequence_length,
            parallel_state.get_context_parallel_world_size(),
            num_microbatches,
        )
    if config.grad_scale_func is None:
        return weight * factor
    one = torch.ones((), dtype=torch.float32, device=batch.tokens.device)
    return config.grad_scale_func(one).view(()) * (weight * factor)


def _num_tokens(batch: GlobalBatch) -> int:
    """Of the global batch, over all replicas."""
    num_microbatches, micro_batch_size, _ = batch.tokens.shape
    replicas = parallel_state.get_data_parallel_world_size()
    return int(num_microbatches * micro_batch_size * batch.sequence_length * replicas)


def _with_metrics(losses: Any, names: tuple[str, ...], totals: torch.Tensor, weight: float) -> Any:
    """Add the alignment's means and the weight to what the last stage reports of each microbatch.

    Megatron sums [numerator, denominator] pairs over microbatches and DP x CP ranks, and averages
    single elements over microbatches.
    """
    for index, report in enumerate(losses):
        for name, total in zip(names, totals[:-1], strict=True):
            pair = torch.stack((total, totals[-1]))
            report[alignment_key(name)] = pair if index == 0 else torch.zeros_like(pair)
        report[WEIGHT_KEY] = totals.new_tensor([weight])
    return losses
