"""The deep linear network of appendix I, with exact Hessians."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

WIDTH, DEPTH, TOKENS = 4, 5, 12


@dataclass(frozen=True)
class DeepLinear:
    """`h^(l + 1) = W^(l) h^(l)` on fixed inputs, in fp64.

    Attributes:
        weights: W^(l), `[d, d]` each.
        inputs: x, `[tokens, d]`.
        teacher: h_T, `[tokens, d]`.
        labels: class of each token, for a loss of the last layer's output.
    """

    weights: list[Tensor]
    inputs: Tensor
    teacher: Tensor
    labels: Tensor

    def states(self, weights: list[Tensor]) -> list[Tensor]:
        """Return h^(0) to h^(L)."""
        states = [self.inputs]
        for weight in weights:
            states.append(states[-1] @ weight.T)
        return states

    def nll(self, weights: list[Tensor]) -> Tensor:
        """Return the mean cross entropy of the output."""
        return F.cross_entropy(self.states(weights)[-1], self.labels)

    def alignment(self, k: int, weights: list[Tensor]) -> Tensor:
        """Return equation 7 as a mean over tokens, written out."""
        h, t = self.states(weights)[k], self.teacher
        return -((h * t).sum(-1) / (h.square().sum(-1) * t.square().sum(-1)).sqrt()).mean()

    def hessian(self, loss: Callable[[list[Tensor]], Tensor]) -> Tensor:
        """Return the exact Hessian, `[L d^2, L d^2]`, row by row."""
        sizes = [weight.shape for weight in self.weights]
        flat = torch.cat([weight.detach().flatten() for weight in self.weights])

        def of_flat(vector: Tensor) -> Tensor:
            parts = vector.split([shape.numel() for shape in sizes])
            return loss([part.view(shape) for part, shape in zip(parts, sizes, strict=True)])

        return torch.autograd.functional.hessian(of_flat, flat, vectorize=True)


def deep_linear(seed: int = 0) -> DeepLinear:
    """Return a random network whose layers keep the length of their input on average."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weights = [(normal(WIDTH, WIDTH) / WIDTH**0.5).requires_grad_() for _ in range(DEPTH)]
    labels = torch.randint(WIDTH, (TOKENS,), generator=generator)
    return DeepLinear(weights, normal(TOKENS, WIDTH), normal(TOKENS, WIDTH), labels)
