"""The hook on layer k: identity forward, the loss's gradient backward, under autograd's tools."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from megatron_let.losses import LOSSES, AlignmentLoss, load_loss
from megatron_let.losses.alignment_hook import AlignmentHook
from tests.helpers.exact_cosine import random

CPU = torch.device("cpu")
every_loss = pytest.mark.parametrize("name", LOSSES)


class States:
    """One teacher state for each microbatch; records the calls."""

    def __init__(self, *states: Tensor) -> None:
        self._states = states
        self.calls: list[tuple[str, int]] = []

    def before_forward(self, microbatch: int) -> None:
        self.calls.append(("forward", microbatch))

    def state(self, microbatch: int) -> Tensor:
        self.calls.append(("state", microbatch))
        return self._states[microbatch]


class Doubling(torch.nn.Module):
    """A layer; Megatron's returns the hidden state and a context."""

    def forward(self, hidden: Tensor) -> tuple[Tensor, None]:
        return hidden * 2, None


def states(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Return `[s, b, d]` of the layer's input, the teacher and the incoming gradient."""
    shapes = ((40, 3, 24), (40, 3, 16), (40, 3, 24))
    hidden, teacher, incoming = (random(*s, seed=i).to(dtype) for i, s in enumerate(shapes))
    return hidden.requires_grad_(), teacher, incoming


def opened(
    loss: AlignmentLoss, teacher: States, scale: float | Tensor = 0.3
) -> tuple[Doubling, AlignmentHook]:
    layer = Doubling()
    hook = AlignmentHook(layer, loss)
    hook.open_step(teacher, scale, CPU)
    return layer, hook


@every_loss
@pytest.mark.parametrize("scale", [0.3, torch.tensor(0.3)], ids=["number", "tensor"])
def test_backward_adds_the_gradient_of_the_loss(name: str, scale: float | Tensor) -> None:
    hidden, teacher, incoming = states()
    loss, source = load_loss(name, None), States(teacher)
    layer, hook = opened(loss, source, scale)
    output, context = layer(hidden)
    assert context is None and torch.equal(output, hidden * 2)
    assert source.calls == [("forward", 0)], "the state may come after the forward"
    output.backward(incoming)
    assert source.calls == [("forward", 0), ("state", 0)]
    factor = torch.as_tensor(scale, dtype=None if isinstance(scale, Tensor) else torch.float64)
    expected, values = loss.function(hidden.detach() * 2, teacher, factor, incoming)
    assert hidden.grad is not None and torch.equal(hidden.grad, expected * 2)
    sums, num_tokens = hook.close_step()
    assert num_tokens == 120
    torch.testing.assert_close(sums, torch.stack([v.sum() for v in values]).float())


@every_loss
def test_backward_builds_no_graph(name: str) -> None:
    hidden, teacher, incoming = states()
    teacher.requires_grad_()
    loss, seen = load_loss(name, None), []

    def spy(*arguments: Any) -> tuple[Tensor, list[Tensor]]:
        gradient, values = loss.function(*arguments)
        seen.extend([torch.is_grad_enabled(), *(x.requires_grad for x in (gradient, *values))])
        return gradient, values

    layer, _ = opened(AlignmentLoss(loss.names, spy), States(teacher))
    layer(hidden)[0].backward(incoming)
    assert len(seen) == 2 + len(loss.names) and not any(seen)
    assert teacher.grad is None


def test_only_the_hidden_state_and_the_scale_are_saved() -> None:
    hidden, teacher, _ = states(torch.bfloat16)
    layer, _ = opened(load_loss("cosine", None), States(teacher))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda x: x):
        output, _ = layer(hidden)
    assert [(x.shape, x.data_ptr()) for x in saved if x.dim()] == [
        (output.shape, output.data_ptr())
    ]


@pytest.mark.parametrize("layer", [Doubling(), torch.nn.Flatten(0, 1)], ids=["new", "view"])
def test_output_is_not_a_view(layer: torch.nn.Module) -> None:
    """Megatron's pipeline asserts it."""
    hidden, teacher, _ = states()
    assert isinstance(layer, Doubling) or layer(hidden)._is_view()
    hook = AlignmentHook(layer, load_loss("cosine", None))
    hook.open_step(States(teacher), 0.3, CPU)
    output = layer(hidden * 1)
    hidden_state = output[0] if isinstance(output, tuple) else output
    assert hidden_state._base is None and not hidden_state._is_view()


def test_incoming_gradient_shared_with_another_branch_is_not_modified() -> None:
    hidden, teacher, incoming = states()
    layer, _ = opened(load_loss("cosine", None), States(teacher), 5.0)
    other = torch.zeros_like(hidden, requires_grad=True)
    kept = incoming.clone()
    # The addition hands one gradient tensor to both of its inputs.
    (layer(hidden)[0] + other).backward(incoming)
    assert other.grad is not None
    assert torch.equal(other.grad, kept) and torch.equal(incoming, kept)


@every_loss
@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_layer_has_the_same_gradient(name: str, reentrant: bool) -> None:
    hidden, teacher, _ = states()
    gradients = []
    for recompute in (False, True):
        hidden.grad = None
        layer, hook = opened(load_loss(name, None), States(teacher))
        output = checkpoint(layer, hidden, use_reentrant=reentrant) if recompute else layer(hidden)
        output[0].square().sum().backward()
        gradients.append(hidden.grad)
        assert hook.close_step()[1] == 120
    assert torch.equal(*gradients)


def test_interleaved_microbatches_get_their_states() -> None:
    hidden, teacher, incoming = states()
    loss, source = load_loss("cosine", None), States(teacher, -teacher, teacher * 0.5 + 1)
    layer, _ = opened(loss, source)
    leaves = [hidden.detach().clone().requires_grad_() for _ in range(3)]
    first, second = layer(leaves[0])[0], layer(leaves[1])[0]
    first.backward(incoming)
    third = layer(leaves[2])[0]
    second.backward(incoming)
    third.backward(incoming)
    scale = torch.tensor(0.3, dtype=torch.float64)
    for index, leaf in enumerate(leaves):
        state = source._states[index]
        expected, _ = loss.function(leaf.detach() * 2, state, scale, incoming)
        assert leaf.grad is not None and torch.equal(leaf.grad, expected * 2)


def test_closed_step_and_no_grad_pass_the_output_unchanged() -> None:
    hidden, teacher, _ = states()
    layer, hook = opened(load_loss("cosine", None), States(teacher))
    with torch.no_grad():
        assert not layer(hidden)[0].requires_grad
    hook.close_step()
    layer(hidden)[0].sum().backward()
    assert hidden.grad is not None and torch.equal(hidden.grad, torch.full_like(hidden, 2))
    hook.open_step(States(teacher), 0.3, CPU)
    hook.remove()
    hidden.grad = None
    layer(hidden)[0].sum().backward()
    assert torch.equal(hidden.grad, torch.full_like(hidden, 2))


def test_scale_is_never_read_on_the_host() -> None:
    # A fake tensor has no value: .item(), float() or a branch on it raises.
    with FakeTensorMode():
        hidden = torch.randn(3, 2, 24, requires_grad=True)
        source = States(torch.randn(3, 2, 10))
        layer, _ = opened(load_loss("cosine", None), source, torch.ones(()))
        layer(hidden)[0].sum().backward()
        assert hidden.grad is not None and hidden.grad.shape == (3, 2, 24)
