"""Interpolation and cosine alignment of hidden states."""

from megatron_let.ops.function import (
    align_hidden_state,
    align_hidden_state_in_backward,
    interpolated_cosine,
)
from megatron_let.ops.reference import interpolate

__all__ = [
    "align_hidden_state",
    "align_hidden_state_in_backward",
    "interpolate",
    "interpolated_cosine",
]
