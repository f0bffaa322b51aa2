"""What every registered alignment loss satisfies, from a table of losses and widths."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from megatron_let.losses import LOSSES, load_loss
from tests.helpers import plain_reference as plain
from tests.helpers.exact_cosine import random

NUM_TOKENS = 150
# Sum over tokens on the plain formula, and the tolerance of its gradient in fp64.
FORMULAS = {
    "cosine": (lambda h, t: -NUM_TOKENS * plain.mean_cosine(h, t), 1e-10),
    "logsum": (lambda h, t: NUM_TOKENS * plain.mean_logsum(h, t), 1e-10),
    "cca": (lambda h, t: -NUM_TOKENS * plain.mean_correlation(h, t), 1e-8),
}

every_loss = pytest.mark.parametrize("name", LOSSES)
every_width = pytest.mark.parametrize("widths", [(24, 16), (16, 24), (20, 20)])


def states(d_m: int, d_t: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Return `[s, b, d]` of hidden, teacher and incoming gradient.

    The teacher is partly a linear map of hidden and not centred, and one feature dominates.
    """
    hidden = random(50, 3, d_m, seed=0)
    teacher = hidden @ random(d_m, d_t, seed=1) + 4 * random(50, 3, d_t, seed=2) + 2
    teacher[..., 3] *= 100
    incoming = random(50, 3, d_m, seed=3)
    return (hidden + 0.5).to(dtype), teacher.to(dtype), incoming.to(dtype)


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


@every_loss
@every_width
def test_gradient_matches_autograd_on_the_plain_formula(name: str, widths: tuple[int, int]) -> None:
    hidden, teacher, incoming = states(*widths)
    formula, tolerance = FORMULAS[name]
    leaf = hidden.clone().requires_grad_()
    total = formula(leaf, teacher)
    (expected,) = torch.autograd.grad(total, leaf)
    loss = load_loss(name, None)
    gradient, values = loss.function(hidden, teacher, scalar(0.3), torch.zeros_like(hidden))
    assert (gradient - 0.3 * expected).norm() < tolerance * expected.norm()
    sign = 1 if name == "logsum" else -1
    assert sign * values[-1].sum().item() == pytest.approx(total.item(), rel=1e-9)
    gradient, _ = loss.function(hidden, teacher, scalar(0.3), incoming)
    torch.testing.assert_close(gradient, incoming + 0.3 * expected, rtol=0, atol=1e-8)


@every_loss
@every_width
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_scale_zero_keeps_the_bits_of_the_incoming_gradient(
    name: str, widths: tuple[int, int], dtype: torch.dtype
) -> None:
    hidden, teacher, incoming = states(*widths, dtype)
    gradient, _ = load_loss(name, None).function(hidden, teacher, scalar(0.0), incoming)
    assert gradient.dtype == dtype and torch.equal(gradient, incoming)


@every_loss
@every_width
def test_gradient_is_linear_in_the_scale(name: str, widths: tuple[int, int]) -> None:
    hidden, teacher, incoming = states(*widths)
    function = load_loss(name, None).function
    once, thrice = (
        function(hidden, teacher, scalar(x), incoming)[0] - incoming for x in (-0.7, -2.1)
    )
    torch.testing.assert_close(3 * once, thrice, rtol=1e-10, atol=1e-12)
    assert once.any()


@every_loss
@every_width
def test_inputs_are_neither_modified_nor_returned(name: str, widths: tuple[int, int]) -> None:
    hidden, teacher, incoming = states(*widths, torch.float32)
    inputs = [hidden, teacher, scalar(0.3), incoming]
    kept = [x.clone() for x in inputs]
    gradient, values = load_loss(name, None).function(*inputs)
    for result in (gradient, *values):
        result.zero_()
    assert all(torch.equal(a, b) for a, b in zip(inputs, kept, strict=True))


@every_loss
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_narrow_dtypes_are_near_fp64(name: str, dtype: torch.dtype, tolerance: float) -> None:
    hidden, teacher, incoming = states(24, 16, dtype)
    function = load_loss(name, None).function
    gradient, values = function(hidden, teacher, scalar(0.3), incoming)
    exact, exact_values = function(
        hidden.double(), teacher.double(), scalar(0.3), incoming.double()
    )
    assert gradient.dtype == dtype and {value.dtype for value in values} == {torch.float32}
    assert (gradient.double() - exact).norm() < tolerance * exact.norm()
    for value, expected in zip(values, exact_values, strict=True):
        torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-4)


@every_loss
def test_cosine_is_the_first_reported_value(name: str) -> None:
    hidden, teacher, incoming = states(24, 16)
    loss = load_loss(name, None)
    _, values = loss.function(hidden, teacher, scalar(0.3), incoming)
    expected = torch.cosine_similarity(plain.interpolate(hidden, 16), teacher, dim=-1)
    assert len(values) == len(loss.names) and loss.names[0] == "cosine"
    assert {value.shape for value in values} == {(50, 3)}
    torch.testing.assert_close(values[0], expected)


@every_loss
@pytest.mark.parametrize("which", range(3))
def test_memory_order_of_an_input_does_not_matter(name: str, which: int) -> None:
    inputs = list(states(24, 16))
    function = load_loss(name, None).function
    expected, expected_values = function(*inputs[:2], scalar(0.3), inputs[2])
    inputs[which] = inputs[which].transpose(0, 1).contiguous().transpose(0, 1)
    gradient, values = function(*inputs[:2], scalar(0.3), inputs[2])
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(values, expected_values)


@every_loss
def test_expanded_incoming_gradient_equals_contiguous_one(name: str) -> None:
    hidden, teacher, _ = states(24, 16)
    function, ones = load_loss(name, None).function, torch.ones_like(hidden)
    expected, _ = function(hidden, teacher, scalar(0.3), ones)
    gradient, _ = function(hidden, teacher, scalar(0.3), torch.ones(()).double().expand_as(hidden))
    assert torch.equal(gradient, expected)


@every_loss
@pytest.mark.parametrize(("d_m", "d_t", "teacher_tokens"), [(24, 16, 49), (24, 1, 50), (0, 16, 50)])
def test_shapes_that_do_not_fit_raise(name: str, d_m: int, d_t: int, teacher_tokens: int) -> None:
    hidden, teacher = torch.ones(50, 3, d_m), torch.ones(teacher_tokens, 3, d_t)
    with pytest.raises(ValueError, match=r"different tokens|cannot interpolate"):
        load_loss(name, None).function(hidden, teacher, scalar(0.3), hidden)


def test_names_of_losses_need_no_torch() -> None:
    code = "import sys, megatron_let.losses as m; assert m.LOSSES and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
