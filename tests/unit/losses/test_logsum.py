"""LogSum on degenerate inputs; the gradient is checked in test_losses.py."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_let.losses.logsum import EPSILON, logsum_loss
from tests.helpers.exact_cosine import random


def gradient_and_loss(hidden: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    scale, incoming = torch.tensor(0.3), torch.zeros_like(hidden)
    gradient, (_, values) = logsum_loss(hidden, teacher, scale, incoming)
    return gradient, values


def test_equal_states_have_a_finite_loss_and_no_gradient() -> None:
    hidden = random(50, 3, 16)
    gradient, values = gradient_and_loss(hidden, hidden)
    torch.testing.assert_close(values, torch.full_like(values, EPSILON).log())
    assert not gradient.any()


def test_zero_vectors_have_a_finite_loss_and_gradient() -> None:
    hidden, teacher = random(50, 3, 24), random(50, 3, 16)
    hidden[0], teacher[0] = 0, 0
    gradient, values = gradient_and_loss(hidden, teacher)
    assert gradient.isfinite().all() and values.isfinite().all()


def test_token_does_not_depend_on_its_chunk_or_batch() -> None:
    hidden, teacher = random(700, 1, 1024).float(), random(700, 1, 512, seed=2).float()
    gradient, values = gradient_and_loss(hidden, teacher)
    for token in (slice(0, 1), slice(255, 257), slice(699, 700)):
        alone = gradient_and_loss(hidden[token], teacher[token])
        torch.testing.assert_close(alone[0], gradient[token])
        torch.testing.assert_close(alone[1], values[token])
