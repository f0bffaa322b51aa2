"""Estimates from Hessian-vector products: squared Frobenius norm and largest eigenvalue."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from scipy.stats import t as student_t
from torch import Tensor

CONFIDENCE = 0.95
_EIGENVALUE_TOLERANCE = 1e-3

# v -> H v, [n] each, for a symmetric H.
Product = Callable[[Tensor], Tensor]


class Interval(NamedTuple):
    """A value, and the bounds of its interval."""

    value: float
    low: float
    high: float


def hessian_product(loss: Tensor, parameters: Sequence[Tensor]) -> Product:
    """Return the product with the Hessian of a loss, by differentiating its gradient.

    Args:
        loss: 0-dim, with a graph that can be differentiated twice.
        parameters: n elements in all; the loss need not depend on each of them.
    """
    gradients = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
    gradient = torch.cat([part.flatten() for part in gradients])

    def product(vector: Tensor) -> Tensor:
        parts = torch.autograd.grad(
            gradient, parameters, vector, retain_graph=True, materialize_grads=True
        )
        return torch.cat([part.flatten() for part in parts])

    return product


def random_signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """Return a probe of +1 and -1, for which `E |H v|^2` is the squared Frobenius norm of H.

    Args:
        like: `[n]`, whose dtype and device the probe has.
        generator: on the CPU, so that probes are the same on every device.
    """
    signs = torch.randint(2, like.shape, generator=generator, dtype=torch.int8)
    return signs.to(like) * 2 - 1


def mean_interval(samples: Sequence[float]) -> Interval:
    """Return the mean of independent samples and Student's interval of 95 % confidence."""
    values = np.asarray(samples, dtype=np.float64)
    mean, count = float(values.mean()), len(values)
    quantile = float(student_t.ppf((1 + CONFIDENCE) / 2, count - 1))
    half = quantile * float(values.std(ddof=1)) / math.sqrt(count)
    return Interval(mean, mean - half, mean + half)


def largest_eigenvalue(product: Product, like: Tensor, starts: int, seed: int) -> Interval:
    """Return the largest eigenvalue of H by Lanczos' method from random vectors.

    H has an eigenvalue within the residual `|H x - value x|` of each start's value, so the interval
    is that of all starts with their residuals; a start that converged to a smaller eigenvalue
    widens it. H has the dtype and device of `like`, `[n]`.
    """
    dtype = np.float64 if like.dtype == torch.float64 else np.float32

    def on_host(vector: np.ndarray) -> np.ndarray:
        result: np.ndarray = product(torch.from_numpy(vector.ravel()).to(like)).cpu().numpy()
        return result

    operator = LinearOperator((len(like), len(like)), matvec=on_host, dtype=dtype)
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(starts):
        start = generator.standard_normal(len(like)).astype(dtype)
        values, vectors = eigsh(operator, 1, which="LA", v0=start, tol=_EIGENVALUE_TOLERANCE)
        vector = vectors[:, 0].astype(dtype)
        residual = float(np.linalg.norm(on_host(vector) - values[0] * vector))
        found.append((float(values[0]), residual))
    return Interval(
        max(value for value, _ in found),
        min(value - residual for value, residual in found),
        max(value + residual for value, residual in found),
    )
