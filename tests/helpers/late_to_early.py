"""A small Llama under `LateToEarly`: sizes, one step, its gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_let.late_to_early import LateToEarly
from tests.helpers import plain_reference as plain

LAYER, STOP_STEP, STEP, WEIGHT = 2, 10, 4, 2.0
D_T, BATCH, LENGTH = 12, 4, 16
DECAYED = WEIGHT * 0.6

MEANS = {
    "cosine": lambda h, t: -plain.mean_cosine(h, t),
    "logsum": plain.mean_logsum,
    "cca": lambda h, t: -plain.mean_correlation(h, t),
}


def aligned(model: Any, **changes: Any) -> LateToEarly:
    arguments = {"weight": WEIGHT, "stop_step": STOP_STEP, **changes}
    return LateToEarly(model.model.layers[LAYER - 1], **arguments)


def gradients(model: Any) -> Tensor:
    """Return all gradients as one vector, and clear them."""
    found = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    return found


def expected(
    model: Any, ids: Tensor, state: Tensor, loss: str = "cosine", mask: Tensor | None = None
) -> Tensor:
    """Differentiate the sum of both losses by autograd, with the layer's output of transformers."""
    output = model(input_ids=ids, labels=ids, output_hidden_states=True)
    hidden = output.hidden_states[LAYER]
    if mask is not None:
        hidden, state = hidden[mask.bool()], state[mask.bool()]
    (output.loss + DECAYED * MEANS[loss](hidden, state)).backward()
    return gradients(model)


def assert_equal(found: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    assert (found - wanted).norm() < tolerance * wanted.norm()


def run(model: Any, let: LateToEarly, ids: Tensor, state: Tensor, **options: Any) -> Tensor:
    with let.step(STEP, state, **options):
        model(input_ids=ids, labels=ids).loss.backward()
    return gradients(model)
