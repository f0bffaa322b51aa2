"""The estimates on the paper's deep linear network, against its exact Hessian."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from megatron_let.theory.curvature import Curvature, Probes, measure
from megatron_let.theory.model_losses import ModelLosses, alignment_loss
from tests.helpers import plain_reference as plain
from tests.helpers.deep_linear import DEPTH, WIDTH, DeepLinear, deep_linear
from tests.helpers.runs import ROOT

WEIGHT = 0.5
LAYERS = range(1, DEPTH + 1)


@pytest.fixture(scope="module")
def network() -> DeepLinear:
    return deep_linear()


def measured(network: DeepLinear, probes: Probes) -> list[Curvature]:
    states = network.states(network.weights)
    losses = {k: alignment_loss(states[k], network.teacher) for k in LAYERS}
    return measure(of_network(network, losses), WEIGHT, probes, lambda text: None)


def of_network(network: DeepLinear, alignment: dict[int, torch.Tensor]) -> ModelLosses:
    parameters: dict[int | None, list[torch.Tensor]] = {None: []}
    parameters |= {index: [weight] for index, weight in enumerate(network.weights)}
    return ModelLosses(network.nll(network.weights), alignment, parameters)


@pytest.fixture(scope="module")
def rows(network: DeepLinear) -> list[Curvature]:
    return measured(network, Probes(signs=300, starts=3))


def exact(network: DeepLinear, row: Curvature) -> torch.Tensor:
    """Return the exact Hessian of a row's loss."""
    nll = network.hessian(network.nll)
    if row.layer is None:
        return nll
    alignment = network.hessian(lambda weights: network.alignment(row.layer, weights))
    return alignment if row.loss == "alignment" else nll + WEIGHT * alignment


def test_intervals_contain_the_exact_values(network: DeepLinear, rows: list[Curvature]) -> None:
    assert [(row.loss, row.layer) for row in rows] == [
        ("nll", None),
        *((loss, k) for k in LAYERS for loss in ("alignment", "total")),
    ]
    base = exact(network, rows[0]).square().sum()
    before: dict[str, torch.Tensor] = {}
    missed = []
    for row in rows:
        hessian = exact(network, row)
        norm, eigenvalue = hessian.square().sum(), torch.linalg.eigvalsh(hessian)[-1]
        rounding = 1e-9
        assert row.eigenvalue.low - rounding <= eigenvalue <= row.eigenvalue.high + rounding
        assert row.eigenvalue.value == pytest.approx(eigenvalue.item(), rel=1e-3)
        found = [(row.squared_norm, norm), (row.added, norm - base)]
        found.append((row.change, norm - before.get(row.loss, norm)))
        before[row.loss] = norm
        for interval, value in found:
            if interval is not None and not interval.low <= value <= interval.high:
                missed.append((row.loss, row.layer))
            assert interval is None or interval.high - interval.low < 0.5 * norm
    # 24 intervals of 95 %.
    assert len(missed) <= 3
    assert [row.change is None for row in rows] == [True] * 3 + [False] * (2 * DEPTH - 2)


def test_blocks_after_k_are_exactly_zero(network: DeepLinear, rows: list[Curvature]) -> None:
    """Equations 10 to 12."""
    assert [r.nonzero_after for r in rows if r.loss == "alignment"] == [0] * DEPTH
    for k in LAYERS:
        hessian = network.hessian(lambda weights, k=k: network.alignment(k, weights))
        size = k * WIDTH**2
        assert not hessian[size:].any() and not hessian[:, size:].any()
        assert hessian[size - WIDTH**2 : size].any()


def test_dependence_on_a_later_layer_is_counted(network: DeepLinear) -> None:
    states = network.states(network.weights)
    # Layer 2's loss computed from layer 3's output.
    losses = of_network(network, {2: alignment_loss(states[3], network.teacher)})
    rows = measure(losses, WEIGHT, Probes(signs=2, starts=1), lambda text: None)
    # Both of the probes, and the one after k.
    assert rows[1].nonzero_after == 2 * WIDTH**2 + 3 * WIDTH**2


def test_alignment_loss_equals_equation_7() -> None:
    hidden, teacher = torch.randn(3, 5, 24).double(), torch.randn(3, 5, 16).double()
    expected = -plain.mean_cosine(hidden, teacher)
    torch.testing.assert_close(alignment_loss(hidden, teacher), expected)


def test_results_depend_on_the_seed_only(network: DeepLinear) -> None:
    probes = Probes(signs=3, starts=1)
    assert measured(network, probes) == measured(network, probes)
    assert measured(network, probes) != measured(network, replace(probes, seed=1))


def test_page_has_the_exact_norms_of_40_networks() -> None:
    networks = [deep_linear(seed) for seed in range(40)]
    norms = torch.tensor(
        [
            [n.hessian(lambda w, k=k, n=n: n.alignment(k, w)).norm() for k in LAYERS]
            for n in networks
        ]
    )
    grows = (norms[:, 1:] > norms[:, :-1]).float().mean(0)
    page = (ROOT / "docs/theory.md").read_text()
    cells = re.findall(r"^\| (\d) \| ([\d.]+) \| ([\d–]+) ?%? \|", page, re.MULTILINE)
    assert [int(k) for k, _, _ in cells] == list(LAYERS)
    medians = [float(median) for _, median, _ in cells]
    assert medians == pytest.approx(norms.median(0).values.tolist(), rel=5e-3)
    assert [int(share) for *_, share in cells[1:]] == [round(100 * x) for x in grows.tolist()]
