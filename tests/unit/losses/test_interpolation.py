"""Interpolation to the teacher's width and its transpose against equation 6 written out densely."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_let.losses.interpolation import Interpolation
from tests.helpers.exact_cosine import WIDTHS, interpolation_matrix, random


def interpolate(hidden: Tensor, width: int) -> Tensor:
    return Interpolation(hidden, hidden.new_empty(0, width)).apply(hidden)


def test_three_columns_from_four_equal_values_by_hand() -> None:
    # u = 0, 1.5, 3: the ends are kept, the middle lies between columns 1 and 2.
    torch.testing.assert_close(
        interpolate(torch.tensor([0.0, 10.0, 30.0, 40.0]), 3), torch.tensor([0.0, 20.0, 40.0])
    )


@pytest.mark.parametrize(("d_m", "d_t"), WIDTHS)
def test_matches_equation_6_and_its_transpose(d_m: int, d_t: int) -> None:
    hidden, grad, matrix = random(3, d_m), random(3, d_t), interpolation_matrix(d_m, d_t)
    interpolation = Interpolation(hidden, grad)
    for result, expected in (
        (interpolation.apply(hidden), hidden @ matrix.T),
        (interpolation.transpose(grad.clone()), grad @ matrix),
    ):
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("d_m", "d_t"), [(2048, 576), (5, 7), (40, 5)])
def test_matches_torch_with_aligned_corners(d_m: int, d_t: int) -> None:
    hidden = random(3, d_m).float()
    expected = F.interpolate(hidden[:, None], size=d_t, mode="linear", align_corners=True)[:, 0]
    # torch computes u_j in fp32, whose error grows with the column.
    torch.testing.assert_close(interpolate(hidden, d_t), expected, rtol=0, atol=d_m * 1e-6)


def test_equal_widths_keep_the_values() -> None:
    hidden = random(3, 16)
    assert torch.equal(interpolate(hidden, 16), hidden)
