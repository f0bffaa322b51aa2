"""The alignment gradient: identity forward, sum of gradients backward, under autograd's tools."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from megatron_let.losses import (
    align_hidden_state,
    align_in_backward,
    interpolated_cosine,
)
from megatron_let.losses.registry import alignment_loss
from tests.unit.losses.test_cosine_reference import (
    exact_cosine,
    exact_gradient,
    random,
    random_pair,
    relative_error,
)

Scale = float | Tensor
SCALES: list[Scale] = [-0.25, torch.tensor(-0.25)]


def hidden_and_teacher(
    d_m: int = 24, d_t: int = 10, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """`[s, b, d]` of 3 x 2 tokens; the hidden state is a leaf that wants a gradient."""
    student, teacher = random_pair(6, d_m, d_t, dtype)
    return student.view(3, 2, d_m).requires_grad_(), teacher.view(3, 2, d_t)


def expected_gradient(hidden: Tensor, teacher: Tensor, incoming: Tensor, scale: float) -> Tensor:
    """`incoming + scale * d(-sum cos) / d hidden` in fp64."""
    weight = torch.full((hidden.shape[0] * hidden.shape[1],), -scale, dtype=torch.float64)
    direction = exact_gradient(hidden.detach().flatten(0, 1), teacher.flatten(0, 1), weight)
    return incoming.double() + direction.view_as(hidden)


@pytest.mark.parametrize("scale", SCALES, ids=["number", "tensor"])
def test_identity_forward_and_sum_backward(scale: Scale) -> None:
    hidden, teacher = hidden_and_teacher()
    out, cosine = align_hidden_state(hidden, teacher, scale)
    assert torch.equal(out, hidden)
    assert not cosine.requires_grad
    expected = exact_cosine(hidden.flatten(0, 1), teacher.flatten(0, 1)).view(3, 2)
    torch.testing.assert_close(cosine, expected)
    incoming = random(*out.shape)
    out.backward(incoming)
    assert hidden.grad is not None
    torch.testing.assert_close(
        hidden.grad, expected_gradient(hidden, teacher, incoming, float(scale)), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes(dtype: torch.dtype) -> None:
    hidden, teacher = hidden_and_teacher(321, 130, dtype)
    out, cosine = align_hidden_state(hidden, teacher, 3.0)
    assert (out.dtype, cosine.dtype) == (dtype, torch.float32)
    incoming = random(*out.shape).to(dtype) * 1e-3
    out.backward(incoming)
    assert hidden.grad is not None and hidden.grad.dtype == dtype
    expected = expected_gradient(hidden, teacher, incoming, 3.0)
    assert relative_error(hidden.grad, expected) < 1e-2
    if dtype.itemsize == 2:  # the sum is rounded once, not the direction first and then the sum
        assert (hidden.grad != expected.to(dtype)).float().mean() < 0.01


def test_leading_dimensions_may_be_any() -> None:
    hidden, teacher = hidden_and_teacher()
    _, expected = align_hidden_state(hidden, teacher, 1.0)
    _, flat = align_hidden_state(hidden[1, 1], teacher[1, 1], 1.0)
    _, deep = align_hidden_state(hidden[:, :, None], teacher[:, :, None], 1.0)
    torch.testing.assert_close(flat, expected[1, 1])
    torch.testing.assert_close(deep[..., 0], expected)


def test_output_is_no_view() -> None:
    hidden, teacher = hidden_and_teacher()
    out, _ = align_hidden_state(hidden * 1, teacher, 1.0)
    assert out._base is None and not out._is_view()


def test_incoming_gradient_shared_with_another_branch_stays() -> None:
    hidden, teacher = hidden_and_teacher()
    other = random(*hidden.shape, seed=3).requires_grad_()
    out, _ = align_hidden_state(hidden, teacher, 5.0)
    incoming = random(*out.shape)
    kept = incoming.clone()
    # The addition hands one gradient tensor to both of its inputs.
    (out + other).backward(incoming)
    assert other.grad is not None
    assert torch.equal(other.grad, kept)
    assert torch.equal(incoming, kept)


def test_incoming_gradient_may_be_expanded() -> None:
    hidden, teacher = hidden_and_teacher()
    align_hidden_state(hidden, teacher, 5.0)[0].sum().backward()
    assert hidden.grad is not None
    expected = expected_gradient(hidden, teacher, torch.ones_like(hidden), 5.0)
    torch.testing.assert_close(hidden.grad, expected, rtol=0, atol=1e-12)


def test_scale_zero_changes_no_bit_of_the_gradient() -> None:
    hidden, teacher = hidden_and_teacher(dtype=torch.bfloat16)
    incoming = random(3, 2, 24).bfloat16()
    align_hidden_state(hidden, teacher, torch.tensor(0.0))[0].backward(incoming)
    assert hidden.grad is not None and torch.equal(hidden.grad, incoming)


def test_large_scale_reaches_fp16_though_the_direction_alone_would_underflow() -> None:
    student, teacher = random_pair(4, 48, 24, torch.float64)
    student, teacher = (student * 1e4 / student.abs().max()).half(), teacher.half()
    hidden = student.view(4, 1, 48).requires_grad_()
    out, _ = align_hidden_state(hidden, teacher.view(4, 1, 24), 2.0**16 * 1e-2)
    out.backward(torch.zeros_like(out))
    assert hidden.grad is not None
    expected = exact_gradient(student, teacher, torch.full((4,), -(2.0**16) * 1e-2))
    assert relative_error(hidden.grad.view(4, 48), expected) < 2e-3


def test_student_of_other_dtype_than_teacher() -> None:
    hidden, teacher = hidden_and_teacher(dtype=torch.float32)
    _, same = align_hidden_state(hidden, teacher, 1.0)
    for dtype in (torch.float64, torch.bfloat16):
        out, cosine = align_hidden_state(hidden, teacher.to(dtype), 1.0)
        out.sum().backward()
        torch.testing.assert_close(cosine, same, rtol=0, atol=1e-2)


@pytest.mark.parametrize("which", ["hidden", "teacher"])
def test_transposed_from_batch_first(which: str) -> None:
    hidden, teacher = hidden_and_teacher()
    expected_out, expected_cosine = align_hidden_state(hidden, teacher, 2.0)
    (expected,) = torch.autograd.grad(expected_out.square().sum(), hidden)
    batch_first = {"hidden": hidden, "teacher": teacher}
    batch_first[which] = batch_first[which].detach().transpose(0, 1).contiguous().transpose(0, 1)
    leaf = batch_first["hidden"].detach().requires_grad_()
    out, cosine = align_hidden_state(leaf, batch_first["teacher"], 2.0)
    torch.testing.assert_close(cosine, expected_cosine)
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), leaf)[0], expected)


def test_sequence_shards_give_the_parts_of_the_whole() -> None:
    hidden, teacher = hidden_and_teacher()
    whole_out, whole_cosine = align_hidden_state(hidden, teacher, 2.0)
    (whole,) = torch.autograd.grad(whole_out.square().sum(), hidden)
    for start in range(3):
        shard = hidden.detach()[start : start + 1].requires_grad_()
        out, cosine = align_hidden_state(shard, teacher[start : start + 1], 2.0)
        assert torch.equal(cosine, whole_cosine[start : start + 1])
        (gradient,) = torch.autograd.grad(out.square().sum(), shard)
        assert torch.equal(gradient, whole[start : start + 1])


def test_same_gradient_as_a_loss_of_its_own() -> None:
    hidden, teacher = hidden_and_teacher(7, 5)
    out, _ = align_hidden_state(hidden, teacher, 0.7)
    (fused,) = torch.autograd.grad(out.square().sum(), hidden)
    cosine = interpolated_cosine(hidden.flatten(0, 1), teacher.flatten(0, 1))
    (summed,) = torch.autograd.grad(hidden.square().sum() - 0.7 * cosine.sum(), hidden)
    torch.testing.assert_close(fused, summed)


def test_no_grad() -> None:
    hidden, teacher = hidden_and_teacher()
    with torch.no_grad():
        out, cosine = align_hidden_state(hidden, teacher, 1.0)
    assert torch.equal(out, hidden) and not out.requires_grad
    torch.testing.assert_close(cosine, align_hidden_state(hidden, teacher, 1.0)[1])


def test_teacher_gets_no_gradient() -> None:
    hidden, teacher = hidden_and_teacher()
    teacher.requires_grad_()
    align_hidden_state(hidden, teacher, 1.0)[0].sum().backward()
    interpolated_cosine(hidden.flatten(0, 1), teacher.flatten(0, 1)).sum().backward()
    assert teacher.grad is None


@pytest.mark.parametrize("function", [align_hidden_state, interpolated_cosine])
def test_two_numbers_a_token_are_saved_beside_the_inputs(function: Callable[..., Any]) -> None:
    hidden, teacher = hidden_and_teacher(dtype=torch.bfloat16)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda x: x):
        if function is align_hidden_state:
            align_hidden_state(hidden, teacher, torch.tensor(1.0))
        else:
            interpolated_cosine(hidden.flatten(0, 1), teacher.flatten(0, 1))
    inputs = {hidden.untyped_storage().data_ptr(), teacher.untyped_storage().data_ptr()}
    extra = [x for x in saved if x.untyped_storage().data_ptr() not in inputs and x.dim() > 0]
    assert [tuple(x.shape) for x in extra] == [(2, 6)]


def _step(hidden: Tensor, teacher: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    out, cosine = align_hidden_state(hidden * 2, teacher, scale)
    more = interpolated_cosine(out.flatten(0, 1), teacher.flatten(0, 1))
    return out.square().sum() + more.sum(), cosine


def _gradient(function: Callable[..., Any], hidden: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
    loss, cosine = function(hidden, *rest)
    return torch.autograd.grad(loss, hidden)[0], cosine


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_recompute(reentrant: bool) -> None:
    hidden, teacher = hidden_and_teacher()
    scale = torch.tensor(0.3)
    expected = _gradient(_step, hidden, teacher, scale)[0]
    loss, _ = checkpoint(_step, hidden, teacher, scale, use_reentrant=reentrant)
    loss.backward()
    assert hidden.grad is not None and torch.equal(hidden.grad, expected)


def test_compile_without_a_graph_break() -> None:
    hidden, teacher = hidden_and_teacher(dtype=torch.float32)
    scale = torch.tensor(0.3)
    expected, expected_cosine = _gradient(_step, hidden, teacher, scale)
    # A test of the CPU host, which turns it off, may have run in this process.
    with torch._dynamo.config.patch(disable=False):
        compiled = torch.compile(_step, backend="aot_eager", fullgraph=True)
        gradient, cosine = _gradient(compiled, hidden, teacher, scale)
    torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(cosine, expected_cosine)


@pytest.mark.parametrize("mask", [None, torch.tensor([False, True, False])])
def test_operators_are_registered_right(mask: Tensor | None) -> None:
    student, teacher = random_pair(3, 12, 7, torch.float32)
    torch.library.opcheck(torch.ops.megatron_let.cosine_forward, (student, teacher, mask))
    coefficients = random(2, 3).float()
    for grad in (None, random(3, 12).float()):
        torch.library.opcheck(
            torch.ops.megatron_let.cosine_backward, (student, teacher, coefficients, grad)
        )


def test_scale_is_never_read_on_the_host() -> None:
    # A fake tensor has no value: .item(), float() or a branch on it raises.
    with FakeTensorMode():
        hidden = torch.randn(3, 2, 24, requires_grad=True)
        scale = torch.ones(())
        align_hidden_state(hidden, torch.randn(3, 2, 10), scale)[0].sum().backward()
        assert hidden.grad is not None and hidden.grad.shape == (3, 2, 24)


def test_wrong_inputs_are_refused() -> None:
    hidden, teacher = hidden_and_teacher()
    with pytest.raises(ValueError, match="different tokens"):
        align_hidden_state(hidden, teacher[:2], 1.0)
    with pytest.raises(ValueError, match="width 24 to 1"):
        align_hidden_state(hidden, teacher[..., :1], 1.0)
    with pytest.raises(ValueError, match="0-dim"):
        align_hidden_state(hidden, teacher, torch.ones(1))


def test_alignment_in_the_backward_is_that_of_the_forward() -> None:
    """The state may come after the forward, and is asked for once."""
    values, teacher = torch.randn(5, 2, 24), torch.randn(5, 2, 16)
    incoming = torch.randn_like(values)
    early = values.clone().requires_grad_()
    out, cosine = align_hidden_state(early * 2, teacher, 0.7)
    out.backward(incoming)
    late = values.clone().requires_grad_()
    asked: list[int] = []
    reported: list[torch.Tensor] = []

    def state() -> torch.Tensor:
        asked.append(1)
        return teacher

    align = alignment_loss("cosine", None).align
    passed = align_in_backward(late * 2, state, 0.7, align, reported.append)
    assert not asked and torch.equal(passed, late * 2)
    passed.backward(incoming)
    assert asked == [1] and torch.equal(reported[0][0], cosine)
    assert torch.equal(late.grad, early.grad)
