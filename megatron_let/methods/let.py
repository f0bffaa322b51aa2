"""LET: aligns layer k of the student with the teacher's hidden state, until S_stop."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.utils import get_model_config

from megatron_let.config.let_config import alignment_weight
from megatron_let.losses import load_loss
from megatron_let.methods.base import ForwardBackward, TeacherMethod, TrainingRun, add_metrics
from megatron_let.methods.global_batch import GlobalBatch, peek, read_ahead
from megatron_let.methods.learned_projection import ProjectionTraining
from megatron_let.methods.let_context import LETContext, build_context
from megatron_let.metrics.write import alignment_key
from megatron_let.placement.scheduler import PassTimes
from megatron_let.placement.state_buffer import TeacherStateBuffer


class LETMethod(TeacherMethod):
    """Trains with LET (paper, Algorithm 1).

    The teacher is loaded at the first step whose weight is above 0, so a run resumed at or past
    S_stop never loads it, and freed at the first step whose weight is 0.
    """

    def __init__(self, run: TrainingRun) -> None:
        super().__init__(run)
        self._loss_names = load_loss(self._config.loss, None).names
        self._context: LETContext | None = None
        self._projection: ProjectionTraining | None = None
        if self._config.projection == "learned":
            self._projection = ProjectionTraining(
                run, is_last_step=lambda: self.weight(run.current_step() + 1) == 0
            )

    def weight(self, step: int) -> float:
        """Return lambda(s) of equation 5."""
        return alignment_weight(step, self._config.weight, self._config.stop_step)

    def describe(self) -> str:
        """Return one line for the log."""
        config = self._config
        return (
            f"layer {config.layer} learns from {self._teacher_name}, weight {config.weight} falling"
            f" to 0 at step {config.stop_step}"
        )

    def wrappers(self) -> dict[str, Callable[[Any], Any]]:
        """Add the set-up of a learned projection."""
        if self._projection is None:
            return super().wrappers()
        setup = "megatron.training.training:setup_model_and_optimizer"
        return {setup: self._projection.wrap_setup, **super().wrappers()}

    def run_with_teacher(
        self, forward_backward: ForwardBackward, weight: float, kwargs: dict[str, Any]
    ) -> Any:
        """Run one global batch with the alignment loss on layer k."""
        model = kwargs["model"]
        shape = (kwargs["num_microbatches"], kwargs["micro_batch_size"], kwargs["seq_length"])
        if self._context is None:
            projection = None if self._projection is None else self._projection.module
            self._context = build_context(self._run, model, shape, projection)
        context = self._context
        batch = self._read(context, shape, kwargs)
        plan = context.begin(batch)
        config, device = get_model_config(model[0]), batch.tokens.device
        if context.hook is not None:
            scale = _gradient_scale(config, weight, batch)
            context.hook.open_step(context.states, scale, device)
        if self._projection is not None:
            self._projection.open_step(weight, _num_tokens(batch))
        timer = context.scheduler.timer(device)
        num_before = len(plan.stages[context.stage].before)
        _before_schedule(context.states, num_before, model[0], timer)
        kwargs["forward_step_func"] = _counted(kwargs["forward_step_func"], context.states, timer)
        with before_finalizing(config, context.states.after_backward):
            losses = forward_backward(**kwargs)
        sums, num_tokens = self._close(context, device).tensor_split([-1])
        context.scheduler.end_step(timer, context.stage, len(batch.tokens))
        keys = map(alignment_key, self._loss_names)
        means = {key: torch.cat((sums[i : i + 1], num_tokens)) for i, key in enumerate(keys)}
        return add_metrics(losses, means, weight)

    def _read(
        self, context: LETContext, shape: tuple[int, int, int], kwargs: dict[str, Any]
    ) -> GlobalBatch:
        """Read the global batch, and the first microbatches of the next one if the plan asks."""
        iterators, num_microbatches = kwargs["data_iterator"], shape[0]
        kwargs["data_iterator"], microbatches = read_ahead(iterators, num_microbatches)
        num_ahead, next_step = 0, self._run.current_step() + 1
        if next_step < self._run.num_steps and self.weight(next_step) > 0:
            num_ahead = context.scheduler.plan(num_microbatches, 0, True).num_ahead
        ahead = None
        # The last stage reads data too, but no teacher tokens.
        if parallel_state.get_model_parallel_group().rank() == 0:
            ahead = peek(iterators, num_ahead, context.tokens.key)
        per_token = get_model_config(kwargs["model"][0]).calculate_per_token_loss
        return context.tokens.share(microbatches, ahead, shape, num_ahead, per_token)

    def _close(self, context: LETContext, device: torch.device) -> torch.Tensor:
        """Return the alignment's sums, then the tokens, of this replica on all of its ranks."""
        totals = torch.zeros(len(self._loss_names) + 1, device=device)
        if context.hook is not None:
            sums, num_tokens = context.hook.close_step()
            if context.counts_tokens:
                totals[:-1], totals[-1] = sums, num_tokens
        return self._reduce(totals, context.states.end())

    def release(self) -> bool:
        """Free the teacher, its buffers, and a projection whose last step did not run."""
        if self._projection is not None:
            self._projection.free()
        if self._context is None:
            return False
        self._context.close()
        self._context = None
        if self._run.sharding is not None:
            self._run.sharding.free()
        return True


def _before_schedule(
    states: TeacherStateBuffer, num_microbatches: int, chunk: Any, timer: PassTimes | None
) -> None:
    """Run the teacher work planned before the schedule, on `num_microbatches` microbatches."""
    if num_microbatches:
        start_param_gather(chunk)
    if timer is None:
        states.before_schedule()
    else:
        timer.time_teacher(states.before_schedule, num_microbatches)


def start_param_gather(chunk: Any) -> None:
    """Start gathering the parameters of the first layers, which then overlaps the teacher.

    With `--overlap-param-gather` Megatron starts it in the first forward pass, which waits for it.

    Args:
        chunk: first model chunk, with or without DDP.
    """
    # Without these hooks, as in the first step, nothing would wait for the gather.
    if not getattr(chunk, "remove_forward_pre_hook_handles", None):
        return
    if chunk.overlap_param_gather_with_optimizer_step or not chunk.bucket_groups:
        return
    first = chunk.bucket_groups[-1]
    if not first.param_gather_dispatched:
        first.start_param_sync()


def _counted(
    forward_step: Callable[..., Any], states: TeacherStateBuffer, timer: PassTimes | None
) -> Callable[..., Any]:
    """Wrap a forward step so that it reports to `states` when it has run."""

    @functools.wraps(forward_step)
    def counted(*args: Any) -> Any:
        result = timer.time_forward(forward_step, *args) if timer else forward_step(*args)
        states.after_forward()
        return result

    return counted


@contextmanager
def before_finalizing(config: Any, work: Callable[[], None]) -> Iterator[None]:
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
    """Return the factor of d(sum of local losses)/dh, which matches Megatron's loss scaling."""
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
    """Return the tokens of the global batch over all replicas."""
    num_microbatches, micro_batch_size, _ = batch.tokens.shape
    replicas = parallel_state.get_data_parallel_world_size()
    return int(num_microbatches * micro_batch_size * batch.sequence_length * replicas)


def gradient_denominator(
    micro_batch_size: int, sequence_length: int, cp_size: int, num_microbatches: int
) -> int:
    """Return the number of tokens that a rank's sum is divided by, in Megatron's default mode.

    Megatron divides each microbatch's loss by the number of microbatches and averages gradients
    over the DP x CP ranks, so neither size enters as a factor. Tensor-parallel ranks sum or repeat
    the gradient themselves, so TP does not enter either.
    """
    return micro_batch_size * (sequence_length // cp_size) * num_microbatches


def per_token_gradient_factor(unmasked_tokens: float, all_tokens: int) -> float:
    """Return the factor of the gradient under `--calculate-per-token-loss`.

    Megatron divides the summed gradient by the unmasked tokens of the global batch; the alignment
    loss is a mean over all tokens (equations 1 and 7 both sum over tokens).
    """
    return unmasked_tokens / all_tokens
