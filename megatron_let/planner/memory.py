"""Memory of one rank in the steady state of training, in bytes that the allocator returns.

Activations are counted for a RoPE transformer with RMSNorm and an attention that saves no scores
(flash, or torch's SDPA). The CUDA context, NCCL's buffers and fragmentation are not included: leave
10 % of the device for them.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Literal

from megatron_let.placement.pipeline import Pipeline
from megatron_let.planner.experts import expert_layer_bytes, expert_work_bytes
from megatron_let.planner.sizes import TransformerSize

Recompute = Literal["none", "full", "block"]
_BF16 = 2
_FP32 = 4
# Interleaved stages receive and send in the background: inputs received ahead of their pass,
# outputs and gradients not yet sent. Counted under fake tensors (tools/benchmark/memory.py).
_MESSAGES_ON_THEIR_WAY = 6


@dataclass(frozen=True)
class Layout:
    """Parallel layout of a run.

    Attributes:
        tp, pp, cp, dp: parallel sizes.
        num_chunks: model chunks per stage (virtual pipeline).
        micro_batch_size: b.
        num_microbatches: microbatches per replica and global batch.
        recompute: method of full recomputation; `selective` saves nothing with this attention.
        recompute_layers: recomputed layers per chunk for `block`, of one unit for `full`.
        sequence_parallel: Megatron's flag of that name.
        distributed_optimizer: the optimizer's state is sharded over dp and cp.
        ep: ranks over which the routed experts are distributed.
        etp: ranks over which each routed expert is split; None for tp, as in Megatron.
    """

    tp: int
    pp: int
    cp: int
    dp: int
    num_chunks: int
    micro_batch_size: int
    num_microbatches: int
    recompute: Recompute = "none"
    recompute_layers: int = 0
    sequence_parallel: bool = True
    distributed_optimizer: bool = True
    ep: int = 1
    etp: int | None = None

    @property
    def expert_tp(self) -> int:
        """Return the ranks over which each routed expert is split."""
        return self.etp or self.tp

    @property
    def expert_dp(self) -> int:
        """Return the ranks of a stage that hold the same routed experts."""
        return self.tp * self.cp * self.dp // (self.ep * self.expert_tp)

    @property
    def pipeline(self) -> Pipeline:
        """Return the pipeline schedule."""
        return Pipeline(self.pp, self.num_microbatches, self.num_chunks)


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one rank of a stage.

    Attributes:
        activations: peak, of all microbatches in flight.
        teacher_weights: 0 on a stage that never runs the teacher.
        teacher_buffers: buffered teacher states, and what the teacher's forward needs beyond the
            work memory of the student's passes, which is free at that time.
        buffers: gathered parameters and gradient buckets; DeepSpeed's ZeRO only.
        host: host memory, not in the total.
    """

    params: int
    grads: int
    optimizer: int
    activations: int
    teacher_weights: int = 0
    teacher_buffers: int = 0
    buffers: int = 0
    host: int = 0
    total: int = field(init=False)

    def __post_init__(self) -> None:
        parts = (self.params, self.grads, self.optimizer, self.activations, self.buffers)
        total = sum(parts) + self.teacher_weights + self.teacher_buffers
        object.__setattr__(self, "total", total)

    def gib(self) -> dict[str, float]:
        """Return all fields in GiB."""
        return {key: value / 2**30 for key, value in asdict(self).items()}


def stage_params(size: TransformerSize, layout: Layout, stage: int) -> int:
    """Return the parameters of one rank of a stage without routed experts."""
    params = size.num_layers // layout.pp * size.dense_layer_params
    first, last = stage == 0, stage == layout.pp - 1
    if first or (last and size.tied):
        params += size.embedding_params
    if last and not size.tied:
        params += size.embedding_params
    # Norms are replicated over TP, but negligible.
    return params // layout.tp


def stage_expert_params(size: TransformerSize, layout: Layout) -> int:
    """Return the parameters of the routed experts on one rank of a stage."""
    params = size.num_layers // layout.pp * size.expert_layer_params
    return params // (layout.ep * layout.expert_tp)


def stage_memory(size: TransformerSize, layout: Layout, seq_length: int, stage: int) -> StageMemory:
    """Return one rank's memory without a teacher: bf16 weights, fp32 gradients, fp32 Adam."""
    dense, experts = stage_params(size, layout, stage), stage_expert_params(size, layout)
    shards, expert_shards = 1, 1
    if layout.distributed_optimizer:
        shards, expert_shards = layout.dp * layout.cp, layout.expert_dp
    return StageMemory(
        params=(dense + experts) * _BF16,
        grads=(dense + experts) * _FP32,
        optimizer=3 * _FP32 * (dense // shards + experts // expert_shards),
        activations=activations(size, layout, seq_length, stage),
    )


def activations(size: TransformerSize, layout: Layout, seq_length: int, stage: int) -> int:
    """Return the peak of what one rank of a stage keeps for its backward passes."""
    tokens = layout.micro_batch_size * seq_length // layout.cp
    layers = _layers_of_chunk(size, layout)
    recomputed = _recomputed_layers(size, layout)
    checkpoint = tokens * _BF16 * size.hidden_size // _sequence_split(layout)
    kept = math.ceil(recomputed / _unit(layout))
    chunk = kept * checkpoint + (layers - recomputed) * tokens * _layer_bytes(size, layout)
    work = pass_work(size, layout, seq_length, stage)
    messages = _MESSAGES_ON_THEIR_WAY * checkpoint if layout.num_chunks > 1 else 0
    return _chunks_in_flight(layout, stage) * chunk + messages + work


def pass_work(size: TransformerSize, layout: Layout, seq_length: int, stage: int) -> int:
    """Return the temporary memory of the student's passes: the larger of the head and one layer.

    The backward of a recomputed layer holds all of its activations; the head is freed by then.
    The experts' forward needs more than a layer's backward.
    """
    tokens = layout.micro_batch_size * seq_length // layout.cp
    head = tokens * _head_bytes(size, layout) if stage == layout.pp - 1 else 0
    # The layers of one unit are recomputed at once.
    at_once = min(_unit(layout), _recomputed_layers(size, layout))
    layer = at_once * _layer_bytes(size, layout)
    if size.experts is None:
        work = _layer_backward_bytes(size, layout, tokens)
    else:
        work = tokens * expert_work_bytes(
            size, size.experts, layout.tp, layout.ep, layout.expert_tp
        )
    # Megatron's `get_global_memory_buffer`, for the gathered input of a layer, stays allocated.
    gathered = _BF16 * size.hidden_size if _sequence_split(layout) > 1 else 0
    return max(head, tokens * layer + work) + tokens * gathered


def _layers_of_chunk(size: TransformerSize, layout: Layout) -> int:
    return size.num_layers // layout.pp // layout.num_chunks


def _recomputed_layers(size: TransformerSize, layout: Layout) -> int:
    """Return the recomputed layers of a chunk."""
    layers = _layers_of_chunk(size, layout)
    block = min(layout.recompute_layers, layers)
    return {"none": 0, "full": layers}.get(layout.recompute, block)


def _unit(layout: Layout) -> int:
    """Return the layers that share a checkpoint (`uniform` of Megatron's `recompute_method`)."""
    return max(1, layout.recompute_layers) if layout.recompute == "full" else 1


def _sequence_split(layout: Layout) -> int:
    return layout.tp if layout.sequence_parallel else 1


def _layer_bytes(size: TransformerSize, layout: Layout) -> int:
    """Return what one layer keeps per token for its backward.

    In bf16: inputs and outputs of the two norms; queries, keys and values before and after the
    rotary embedding (values once); the attention's output; the MLP's first product and activation.
    In fp32, the logarithm of each head's sum of exponentials.
    Norms of queries and keys keep their inputs, which are counted.
    """
    heads = size.head_dim * (3 * size.num_heads + 3 * size.num_kv_heads)
    mlp = 0 if size.experts else (3 if size.gated else 2) * size.ffn_hidden_size
    whole = 4 * size.hidden_size
    found = _BF16 * (whole // _sequence_split(layout) + (heads + mlp) // layout.tp)
    found += _FP32 * size.num_heads // layout.tp
    return found + (
        expert_layer_bytes(size, size.experts, layout.tp, layout.expert_tp) if size.experts else 0
    )


def _layer_backward_bytes(size: TransformerSize, layout: Layout, tokens: int) -> int:
    """Return the gradients alive at once in one layer's backward.

    They are that of the layer's output and, first, those of the second product's weight and input,
    for which sequence parallelism gathers the output's; then that of the first product.
    """
    ffn = size.ffn_hidden_size // layout.tp
    gathered = size.hidden_size if _sequence_split(layout) > 1 else 0
    second = tokens * (gathered + ffn) + size.hidden_size * ffn
    first = tokens * (2 if size.gated else 1) * ffn
    output = tokens * size.hidden_size // _sequence_split(layout)
    return _BF16 * (output + max(second, first))


def _head_bytes(size: TransformerSize, layout: Layout) -> int:
    """Return final norm and logits per token, in bf16 and in fp32 for the cross entropy."""
    norm = 2 * _BF16 * size.hidden_size // _sequence_split(layout)
    return norm + (_BF16 + _FP32) * size.vocab_size // layout.tp


def _chunks_in_flight(layout: Layout, stage: int) -> int:
    """Return the most (microbatch, chunk) pairs between forward and backward at once."""
    total = layout.num_microbatches * layout.num_chunks
    return min(layout.pipeline.num_warmup(stage) + 1, total)


def teacher_weights(teacher: TransformerSize) -> int:
    """Return the whole teacher, without an output layer."""
    return teacher.num_bytes * (
        teacher.num_layers * teacher.layer_params + teacher.embedding_params
    )


def teacher_state(teacher: TransformerSize, layout: Layout, seq_length: int) -> int:
    """Return one microbatch's teacher state on one rank, [s_local, b, d_T]."""
    local = seq_length // layout.cp // _sequence_split(layout)
    return teacher.num_bytes * local * layout.micro_batch_size * teacher.hidden_size


def teacher_work(teacher: TransformerSize, samples: int, seq_length: int) -> int:
    """Return the peak of a teacher forward over `samples`: the MLP of one layer."""
    mlp = (3 if teacher.gated else 2) * teacher.ffn_hidden_size
    return teacher.num_bytes * samples * seq_length * (3 * teacher.hidden_size + mlp)
