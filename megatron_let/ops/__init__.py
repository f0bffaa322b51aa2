"""Interpolation, projection and alignment of hidden states."""

from megatron_let.ops.cca import align_by_cca
from megatron_let.ops.function import (
    Align,
    align_hidden_state,
    align_in_backward,
    interpolated_cosine,
)
from megatron_let.ops.logsum import align_by_logsum
from megatron_let.ops.projection import align_by_projection
from megatron_let.ops.reference import interpolate

__all__ = [
    "Align",
    "align_by_cca",
    "align_by_logsum",
    "align_by_projection",
    "align_hidden_state",
    "align_in_backward",
    "interpolate",
    "interpolated_cosine",
]
