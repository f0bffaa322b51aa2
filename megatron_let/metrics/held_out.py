"""Losses of the single microbatches of an evaluation."""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor


class MicrobatchLosses:
    """Collects the losses of an evaluation's microbatches, to pair them with those of another run.

    They belong to the same tokens in each evaluation of a run, and in runs of the same evaluation
    settings and number of data-parallel ranks.
    """

    def __init__(self, key: str) -> None:
        """Collect what a forward step reports as `[sum, number of tokens]` under `key`."""
        self._key = key
        self._reported: list[Tensor] = []

    def observe(self, forward_step: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap Megatron's `forward_step_func`."""

        def observed(*args: Any, **kwargs: Any) -> tuple[Any, Callable[..., Any]]:
            output, loss_function = forward_step(*args, **kwargs)

            def observed_loss(*outputs: Any, **options: Any) -> Any:
                result = loss_function(*outputs, **options)
                self._add(result[-1])
                return result

            return output, observed_loss

        return observed

    def _add(self, reported: Any) -> None:
        value = reported.get(self._key) if isinstance(reported, dict) else None
        if isinstance(value, Tensor) and value.numel() == 2:
            self._reported.append(value.detach().view(2).float())

    def gather(self) -> list[float]:
        """Return the mean token losses in the order of the data set; empty if none were reported.

        A collective of the ranks of the last pipeline stage; the others return nothing.
        """
        if not self._reported:
            return []
        sums = torch.stack(self._reported)
        # A sequence is divided among context-parallel ranks.
        torch.distributed.all_reduce(sums, group=parallel_state.get_context_parallel_group())
        group = parallel_state.get_data_parallel_group()
        of_ranks = [torch.empty_like(sums) for _ in range(group.size())]
        torch.distributed.all_gather(of_ranks, sums, group=group)
        losses, tokens = torch.stack(of_ranks, dim=1).flatten(0, 1).unbind(-1)
        return [round(loss, 5) for loss in (losses / tokens.clamp(min=1)).tolist()]
