"""Interpolation and alignment of hidden states."""

from megatron_let.ops.cca import align_by_cca
from megatron_let.ops.function import align_hidden_state, interpolated_cosine
from megatron_let.ops.logsum import align_by_logsum
from megatron_let.ops.reference import interpolate

__all__ = [
    "align_by_cca",
    "align_by_logsum",
    "align_hidden_state",
    "interpolate",
    "interpolated_cosine",
]
