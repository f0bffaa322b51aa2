"""Interpolation, projection and alignment of hidden states."""

from megatron_let.losses.cca import align_by_cca
from megatron_let.losses.cosine import (
    Align,
    align_hidden_state,
    align_in_backward,
    interpolated_cosine,
)
from megatron_let.losses.cosine_reference import interpolate
from megatron_let.losses.logsum import align_by_logsum
from megatron_let.losses.projected import align_by_projection

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
