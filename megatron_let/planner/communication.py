"""Seconds of communication in one step, from bytes and the data sheet's bandwidths.

Tensor-parallel ranks share a node and use `Gpu.link`, and so do context- and expert-parallel ranks
if a node holds them all; everything else crosses nodes and uses `Gpu.network`. Latency is not
counted.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_let.planner.memory import (
    Layout,
    stage_expert_params,
    stage_params,
    teacher_state,
)
from megatron_let.planner.sizes import Gpu, TransformerSize

_BF16 = 2
_FP32 = 4
_NODE_RANKS = 8


def layer_exchange(size: TransformerSize, layout: Layout, seq_length: int, gpu: Gpu) -> float:
    """Return the seconds of one layer's collectives in a forward pass, not overlapped.

    Tensor parallelism gathers and scatters the activation four times, with experts only around the
    attention and the shared experts; context parallelism gathers the other ranks' keys and values.
    """
    tokens = layout.micro_batch_size * seq_length / layout.cp
    times = 4 if size.experts is None or size.experts.shared_ffn_hidden_size else 2
    tensor = times * _BF16 * tokens * size.hidden_size * (layout.tp - 1) / layout.tp
    heads = 2 * size.num_kv_heads * size.head_dim / layout.tp
    context = _BF16 * tokens * heads * (layout.cp - 1)
    experts = expert_exchange(size, layout, tokens, gpu)
    # Megatron's order of ranks is tp-cp-ep-dp-pp.
    bandwidth = gpu.link if layout.tp * layout.cp <= _NODE_RANKS else gpu.network
    return tensor / gpu.link + context / bandwidth + experts


def expert_exchange(size: TransformerSize, layout: Layout, tokens: float, gpu: Gpu) -> float:
    """Return the seconds of one layer's routed tokens to their experts and back, in a forward pass.

    A split expert gathers the tokens of its ranks and scatters its output, in fp32.
    """
    if size.experts is None:
        return 0.0
    routed = size.experts.topk * _BF16 * tokens / layout.tp * size.hidden_size
    ranks, split = layout.ep, layout.expert_tp
    bandwidth = gpu.link if layout.tp * layout.cp * ranks <= _NODE_RANKS else gpu.network
    gathered = (1 + _FP32 / _BF16) * routed * (split - 1)
    return 2 * routed * (ranks - 1) / ranks / bandwidth + gathered / gpu.link


def activation_transfer(size: TransformerSize, layout: Layout, seq_length: int, gpu: Gpu) -> float:
    """Return the seconds in which one rank sends its activation to the next stage."""
    tokens = layout.micro_batch_size * seq_length / layout.cp
    sent = _BF16 * tokens * size.hidden_size / layout.tp
    return sent / gpu.network if layout.pp > 1 else 0.0


def state_transfer(
    teacher: TransformerSize | None, layout: Layout, seq_length: int, gpu: Gpu
) -> float:
    """Return the seconds in which one rank sends a teacher state to the aligned stage."""
    if teacher is None or layout.pp == 1:
        return 0.0
    return teacher_state(teacher, layout, seq_length) / gpu.network


def exposed_reduction(
    size: TransformerSize,
    layout: Layout,
    gpu: Gpu,
    forward: Sequence[float],
    backward: Sequence[float],
) -> float:
    """Return the seconds of a step's data-parallel communication that no pass hides.

    With `--overlap-grad-reduce` and `--overlap-param-gather` the fp32 gradients are reduced during
    a stage's last backward and the bf16 parameters gathered during its first forward.

    Args:
        forward, backward: [num_stages], seconds per microbatch.

    Returns:
        The largest value of any stage.
    """
    ranks, expert_ranks = layout.dp * layout.cp, layout.expert_dp
    experts = stage_expert_params(size, layout) * (expert_ranks - 1) / expert_ranks
    exposed = [0.0]
    for stage in range(layout.pp):
        dense = stage_params(size, layout, stage) * (ranks - 1) / ranks
        sent = (dense + experts) / gpu.network
        reduced = max(0.0, _FP32 * sent - backward[stage])
        exposed.append(reduced + max(0.0, _BF16 * sent - forward[stage]))
    return max(exposed)
