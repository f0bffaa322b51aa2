"""What a run's flags say about a DeepSpeed config, as plain values."""

from __future__ import annotations

import argparse
from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """The settings of a run that a DeepSpeed config could contradict; names are Megatron's.

    Attributes:
        micro_batch_size, global_batch_size: in sequences.
        data_parallel_size: replicas.
        clip_grad: norm to clip to; 0 for none.
        bf16: parameters in bf16 with fp32 masters; otherwise fp32.
        grads_in_fp32: accumulate and reduce bf16 gradients in fp32.
        lr, adam_beta1, adam_beta2, adam_eps, weight_decay: of AdamW, before the schedule.
        use_distributed_optimizer: shard the optimizer's state (ZeRO-1).
        overlap_grad_reduce: reduce gradients during the backward pass.
    """

    micro_batch_size: int
    global_batch_size: int
    data_parallel_size: int
    clip_grad: float
    bf16: bool
    grads_in_fp32: bool
    lr: float
    adam_beta1: float
    adam_beta2: float
    adam_eps: float
    weight_decay: float
    use_distributed_optimizer: bool
    overlap_grad_reduce: bool

    @property
    def num_microbatches(self) -> int:
        """Microbatches of one replica in a global batch."""
        return self.global_batch_size // (self.micro_batch_size * self.data_parallel_size)


def recipe_from_args(args: argparse.Namespace) -> Recipe:
    """Take the values from Megatron's validated arguments."""
    return Recipe(
        grads_in_fp32=args.accumulate_allreduce_grads_in_fp32,
        **{
            name: getattr(args, name)
            for name in Recipe.__dataclass_fields__
            if name != "grads_in_fp32"
        },
    )
