"""Memory of one rank in the steady state of training, in bytes that the allocator hands out.

What a layer keeps for its backward is counted for a RoPE transformer with RMSNorm and an attention
that saves no scores (flash, or torch's). The CUDA context, NCCL's buffers and fragmentation come on
top: leave 10 % of the device to them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Literal

from megatron_let.placement.pipeline import Pipeline
from megatron_let.planner.sizes import TransformerSize

Recompute = Literal["none", "full", "block"]
_BF16 = 2
_FP32 = 4


@dataclass(frozen=True)
class Layout:
    """How a run is cut over GPUs.

    Attributes:
        tp, pp, cp, dp: parallel sizes.
        num_chunks: model chunks of a stage (virtual pipeline).
        micro_batch_size: b.
        num_microbatches: of a global batch and replica.
        recompute: of whole layers; `selective` recomputation saves nothing beside such attention.
        recompute_layers: of each stage, for `block`.
        sequence_parallel: Megatron's flag of that name.
        distributed_optimizer: its state is cut over dp and cp.
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

    @property
    def pipeline(self) -> Pipeline:
        """Its schedule."""
        return Pipeline(self.pp, self.num_microbatches, self.num_chunks)


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one rank of a stage.

    Attributes:
        activations: at their peak, of all microbatches in flight.
        teacher_weights: 0 on a stage that never runs it.
        teacher_buffers: states that are held, and what the teacher's forward needs beyond what
            the student's passes do at another time.
        buffers: gathered parameters and buckets of gradients; DeepSpeed's ZeRO only.
        host: in the host's memory, not in the total.
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
        """The same in GiB."""
        return {key: value / 2**30 for key, value in asdict(self).items()}


def stage_params(size: TransformerSize, layout: Layout, stage: int) -> int:
    """Parameters of one rank of a stage."""
    params = size.num_layers // layout.pp * size.layer_params
    first, last = stage == 0, stage == layout.pp - 1
    if first or (last and size.tied):
        params += size.embedding_params
    if last and not size.tied:
        params += size.embedding_params
    # The norms are not cut, but they are nothing beside the matrices.
    return params // layout.tp


def stage_memory(size: TransformerSize, layout: Layout, seq_length: int, stage: int) -> StageMemory:
    """Of one rank without a teacher: bf16 parameters, fp32 gradients, Adam on fp32 copies."""
    params = stage_params(size, layout, stage)
    shards = layout.dp * layout.cp if layout.distributed_optimizer else 1
    return StageMemory(
        params=params * _BF16,
        grads=params * _FP32,
        optimizer=params * 3 * _FP32 // shards,
        activations=activations(size, layout, seq_length, stage),
    )


def activations(size: TransformerSize, layout: Layout, seq_length: int, stage: int) -> int:
    """Kept by one rank of a stage for its backward passes, at their peak."""
    tokens = layout.micro_batch_size * seq_length // layout.cp
    layers = _layers_of_chunk(size, layout)
    recomputed = _recomputed_layers(size, layout)
    checkpoint = tokens * _BF16 * size.hidden_size // _sequence_split(layout)
    chunk = recomputed * checkpoint + (layers - recomputed) * tokens * _layer_bytes(size, layout)
    work = pass_work(size, layout, seq_length, stage)
    return _chunks_in_flight(layout, stage) * chunk + work


def pass_work(size: TransformerSize, layout: Layout, seq_length: int, stage: int) -> int:
    """What the student's passes need beside what waits for a backward: the head, or one layer's.

    A recomputed layer is whole again in its backward; the head has been freed by then.
    """
    tokens = layout.micro_batch_size * seq_length // layout.cp
    head = tokens * _head_bytes(size, layout) if stage == layout.pp - 1 else 0
    layer = _layer_bytes(size, layout) if _recomputed_layers(size, layout) else 0
    return max(head, tokens * (layer + _layer_backward_bytes(size, layout)))


def _layers_of_chunk(size: TransformerSize, layout: Layout) -> int:
    return size.num_layers // layout.pp // layout.num_chunks


def _recomputed_layers(size: TransformerSize, layout: Layout) -> int:
    """Of a chunk."""
    layers = _layers_of_chunk(size, layout)
    block = min(layout.recompute_layers, layers)
    return {"none": 0, "full": layers}.get(layout.recompute, block)


def _sequence_split(layout: Layout) -> int:
    return layout.tp if layout.sequence_parallel else 1


def _layer_bytes(size: TransformerSize, layout: Layout) -> int:
    """Kept for the backward by one layer for one token.

    bf16 inputs and outputs of the two norms; queries, keys and values before and after the rotary
    embedding (values once); the attention's output; the MLP's first product and its activation.
    """
    heads = size.head_dim * (3 * size.num_heads + 3 * size.num_kv_heads)
    mlp = (3 if size.gated else 2) * size.ffn_hidden_size
    whole = 4 * size.hidden_size
    return _BF16 * (whole // _sequence_split(layout) + (heads + mlp) // layout.tp)


def _layer_backward_bytes(size: TransformerSize, layout: Layout) -> int:
    """Gradients alive at once in one layer's backward, for one token: of its output, and of the
    MLP's first product, whose activation's own takes the place of what the layer has kept.
    """
    product = (2 if size.gated else 1) * size.ffn_hidden_size
    return _BF16 * (size.hidden_size // _sequence_split(layout) + product // layout.tp)


def _head_bytes(size: TransformerSize, layout: Layout) -> int:
    """Final norm, logits in bf16 and in fp32 for the cross entropy, for one token."""
    norm = 2 * _BF16 * size.hidden_size // _sequence_split(layout)
    return norm + (_BF16 + _FP32) * size.vocab_size // layout.tp


def _chunks_in_flight(layout: Layout, stage: int) -> int:
    """Model chunks whose forward of a microbatch waits for its backward, at most."""
    total = layout.num_microbatches * layout.num_chunks
    return min(layout.pipeline.num_warmup(stage) + 1, total)


def teacher_weights(teacher: TransformerSize) -> int:
    """The whole teacher in bf16, without an output layer."""
    return _BF16 * (teacher.num_layers * teacher.layer_params + teacher.embedding_params)


def teacher_state(teacher: TransformerSize, layout: Layout, seq_length: int) -> int:
    """One microbatch's state on one rank, [s_local, b, d_T] in bf16."""
    local = seq_length // layout.cp // _sequence_split(layout)
    return _BF16 * local * layout.micro_batch_size * teacher.hidden_size


def teacher_work(teacher: TransformerSize, samples: int, seq_length: int) -> int:
    """What a forward pass of the teacher over some samples needs at once: the MLP of one layer."""
    mlp = (3 if teacher.gated else 2) * teacher.ffn_hidden_size
    return _BF16 * samples * seq_length * (3 * teacher.hidden_size + mlp)
