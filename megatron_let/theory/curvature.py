"""Curvature of the alignment loss at each depth, and of the whole loss (equations 9 to 17)."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_let.theory.hessian import (
    Interval,
    Product,
    hessian_product,
    largest_eigenvalue,
    mean_interval,
    random_signs,
)
from megatron_let.theory.model_losses import ModelLosses


@dataclass(frozen=True)
class Probes:
    """How much is sampled.

    Attributes:
        signs: probes of the squared Frobenius norm, the same for every loss; at least 2.
        starts: start vectors of Lanczos' method.
        seed: of both.
    """

    signs: int = 20
    starts: int = 2
    seed: int = 1234


@dataclass(frozen=True)
class Curvature:
    """Curvature of one loss.

    Attributes:
        loss: `nll`, `alignment` or `total` (equation 9).
        layer: k, 1-based; None for `nll`.
        squared_norm: squared Frobenius norm of the Hessian.
        change: of the squared norm from the previous k; None for the first.
        added: squared norm of `total` less that of `nll`; None for the others.
        eigenvalue: the largest.
        nonzero_after: entries of the Hessian's products that equations 11 and 12 say are 0 and that
            are not; None for losses that depend on all layers.
    """

    loss: str
    layer: int | None
    squared_norm: Interval
    change: Interval | None
    added: Interval | None
    eigenvalue: Interval
    nonzero_after: int | None


def measure(
    losses: ModelLosses, weight: float, probes: Probes, progress: Callable[[str], None]
) -> list[Curvature]:
    """Estimate the curvature of the losses of one model.

    All losses get the same probes, so that differences between them have narrow intervals.

    Args:
        weight: lambda of equation 9.
        progress: called with what is being computed.

    Returns:
        `nll`, then `alignment` and `total` for each k.
    """
    nll, alignment, parameters = losses.nll, losses.alignment, losses.parameters
    # Layers in order, so that what follows layer k is a tail; None, which has the embedding, first.
    order = sorted(parameters, key=lambda layer: -1 if layer is None else layer)
    flat = [p for layer in order for p in parameters[layer]]
    sizes = {layer: sum(p.numel() for p in parameters[layer]) for layer in order}
    ends = {k: sum(sizes[i] for i in order if i is None or i < k) for k in alignment}
    like = torch.cat([p.detach().flatten() for p in flat])
    of_nll = hessian_product(nll, flat)
    of_layer = {k: hessian_product(loss, flat) for k, loss in alignment.items()}
    samples, nonzero = _norm_samples(of_nll, of_layer, ends, weight, like, probes, progress)

    base = samples["nll", None]
    progress("largest eigenvalue of nll")
    eigenvalue = largest_eigenvalue(of_nll, like, probes.starts, probes.seed)
    rows = [Curvature("nll", None, mean_interval(base), None, None, eigenvalue, None)]
    for before, k in zip((None, *of_layer), of_layer, strict=False):
        total = _sum(of_nll, of_layer[k], weight)
        for loss, product in (("alignment", of_layer[k]), ("total", total)):
            own, is_total = samples[loss, k], loss == "total"
            change = _difference(own, samples.get((loss, before)))
            added = _difference(own, base) if is_total else None
            progress(f"largest eigenvalue of {loss} at layer {k}")
            eigenvalue = largest_eigenvalue(product, like, probes.starts, probes.seed)
            after = None if is_total else nonzero[k]
            rows.append(Curvature(loss, k, mean_interval(own), change, added, eigenvalue, after))
    return rows


def _norm_samples(
    of_nll: Product,
    of_layer: Mapping[int, Product],
    ends: Mapping[int, int],
    weight: float,
    like: Tensor,
    probes: Probes,
    progress: Callable[[str], None],
) -> tuple[dict[tuple[str, int | None], list[float]], dict[int, int]]:
    """Return `|H v|^2` per probe, by loss and k, and the entries after k that are not 0, by k.

    With v after k only, all of `H v` must be 0; with any v, what follows k.
    """
    generator = torch.Generator().manual_seed(probes.seed)
    samples: dict[tuple[str, int | None], list[float]] = defaultdict(list)
    nonzero = dict.fromkeys(of_layer, 0)
    for number in range(probes.signs):
        progress(f"probe {number + 1} of {probes.signs}")
        probe = random_signs(like, generator)
        base = of_nll(probe)
        samples["nll", None].append(_squared_norm(base))
        for k, product in of_layer.items():
            own, end = product(probe), ends[k]
            samples["alignment", k].append(_squared_norm(own))
            samples["total", k].append(_squared_norm(base.add(own, alpha=weight)))
            nonzero[k] += int(own[end:].count_nonzero())
            if number == 0:
                after = probe.clone()
                after[:end] = 0
                nonzero[k] += int(product(after).count_nonzero())
    return dict(samples), nonzero


def _squared_norm(vector: Tensor) -> float:
    return float(vector.double().square().sum())


def _sum(first: Product, second: Product, weight: float) -> Product:
    return lambda vector: first(vector).add(second(vector), alpha=weight)


def _difference(samples: list[float], others: list[float] | None) -> Interval | None:
    """Return the mean difference of samples of the same probes."""
    if others is None:
        return None
    return mean_interval([a - b for a, b in zip(samples, others, strict=True)])
