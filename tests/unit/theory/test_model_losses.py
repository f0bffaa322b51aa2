"""Losses of a Llama whose graphs have second derivatives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_let.errors import LETError
from megatron_let.theory.hessian import hessian_product
from megatron_let.theory.model_losses import model_losses
from tests.helpers import plain_reference as plain
from tests.helpers.models import NUM_LAYERS, VOCAB_SIZE, random_model

LAYERS = (1, NUM_LAYERS)


@pytest.fixture(scope="module")
def model() -> Any:
    """A Llama whose final norm changes a cosine."""
    model = random_model("llama", 16).double().eval()
    with torch.no_grad():
        model.model.norm.weight.uniform_(0.2, 2)
    return model


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(VOCAB_SIZE, (2, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def state() -> Tensor:
    return torch.randn(2, 6, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_losses_equal_transformers_and_the_plain_formula(
    model: Any, tokens: Tensor, state: Tensor
) -> None:
    found = model_losses(model, state, tokens, LAYERS)
    output = model(tokens, labels=tokens, output_hidden_states=True)
    torch.testing.assert_close(found.nll, output.loss.double())
    first = -plain.mean_cosine(output.hidden_states[1][:, :-1], state)
    torch.testing.assert_close(found.alignment[1], first)
    # The layer's output, without the final norm.
    last = -plain.mean_cosine(output.hidden_states[-1][:, :-1], state)
    assert not torch.isclose(found.alignment[NUM_LAYERS], last)


def test_hooks_are_removed(model: Any, tokens: Tensor, state: Tensor) -> None:
    before = [dict(layer._forward_hooks) for layer in model.model.layers]
    model_losses(model, state, tokens, LAYERS)
    assert [dict(layer._forward_hooks) for layer in model.model.layers] == before


def test_parameters_are_grouped_by_layer(model: Any, tokens: Tensor, state: Tensor) -> None:
    found = model_losses(model, state, tokens, LAYERS).parameters
    assert list(found) == [*range(NUM_LAYERS), None]
    assert sum(map(len, found.values())) == len(list(model.parameters()))
    assert {id(p) for p in found[1]} == {id(p) for p in model.model.layers[1].parameters()}


@pytest.mark.parametrize("name", ["nll", "alignment"])
def test_product_equals_differences_of_gradients(
    name: str, model: Any, tokens: Tensor, state: Tensor
) -> None:
    parameters = list(model.parameters())
    generator = torch.Generator().manual_seed(2)
    direction = [torch.randn(p.shape, generator=generator).double() for p in parameters]

    def loss() -> Tensor:
        found = model_losses(model, state, tokens, LAYERS)
        return found.nll if name == "nll" else found.alignment[NUM_LAYERS]

    product = hessian_product(loss(), parameters)(torch.cat([d.flatten() for d in direction]))
    gradients = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.add_(d, alpha=sign * 1e-4)
        found = torch.autograd.grad(loss(), parameters, materialize_grads=True)
        gradients.append(torch.cat([g.flatten() for g in found]))
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.sub_(d, alpha=sign * 1e-4)
    expected = (gradients[0] - gradients[1]) / 2e-4
    # Llama's norms compute in fp32.
    assert (product - expected).norm() < 1e-3 * expected.norm()


def test_layer_out_of_range_is_refused(model: Any, tokens: Tensor, state: Tensor) -> None:
    with pytest.raises(LETError, match=r"--layers has 4 but the model has 3 layers"):
        model_losses(model, state, tokens, (1, 4))
