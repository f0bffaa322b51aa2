"""Megatron's schedule without pipelining, with DeepSpeed's backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.core.pipeline_parallel.schedules import forward_step
from megatron.core.utils import get_model_config

from megatron_let.engines.deepspeed.model import DeepSpeedModel


def forward_backward(
    *,
    forward_step_func: Callable[..., Any],
    data_iterator: Any,
    model: list[DeepSpeedModel],
    num_microbatches: int,
    **unused: Any,
) -> list[dict[str, Any]]:
    """Run one global batch; keyword arguments and result are those of Megatron's schedules.

    The optimizer calls the last microbatch's `engine.step()`.
    """
    (chunk,) = model
    config = get_model_config(chunk)
    reports: list[dict[str, Any]] = []
    if config.timers is not None:
        config.timers("forward-backward", log_level=1).start(barrier=config.barrier_with_L1_time)
    for index in range(num_microbatches):
        loss, _ = forward_step(
            forward_step_func,
            data_iterator,
            chunk,
            num_microbatches,
            None,
            reports,
            config,
            cp_group_size=1,
            is_first_microbatch=index == 0,
            current_microbatch=index,
        )
        # Megatron's forward step has divided the loss by the number of microbatches.
        chunk.engine.backward(loss, scale_wrt_gas=False)
        if index < num_microbatches - 1:
            chunk.engine.step()
    if config.finalize_model_grads_func is not None:
        config.finalize_model_grads_func([chunk], None)
    if config.timers is not None:
        config.timers("forward-backward").stop()
    return reports


def finalize_model_grads(*args: Any, **kwargs: Any) -> None:
    """Replace Megatron's function: DeepSpeed's backward has already reduced the gradients."""


def wrap_getter(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `get_forward_backward_func`; evaluation keeps Megatron's schedule."""

    def getter(*args: Any, **kwargs: Any) -> Callable[..., Any]:
        evaluate = original(*args, **kwargs)

        def run(*, forward_only: bool = False, **options: Any) -> Any:
            if forward_only:
                return evaluate(forward_only=True, **options)
            return forward_backward(**options)

        return run

    return getter
