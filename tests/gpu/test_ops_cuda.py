"""The compiled kernels on a GPU, against the dense fp64 reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_let.losses import align_hidden_state, interpolated_cosine
from tests.unit.losses.test_cosine_reference import (
    COSINE_ERROR,
    GRADIENT_ERROR,
    WIDTHS,
    exact_cosine,
    exact_gradient,
    gradient_error,
    random,
    random_pair,
    relative_error,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def on_gpu(
    student: Tensor, teacher: Tensor, weight: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The cosine and `d sum(weight * cos) / d student`, computed on the GPU."""
    leaf = student.cuda().requires_grad_()
    cosine = interpolated_cosine(leaf, teacher.cuda(), None if mask is None else mask.cuda())
    (gradient,) = torch.autograd.grad(cosine, leaf, weight.to(cosine))
    return cosine.detach().cpu(), gradient.cpu()


@pytest.mark.parametrize("dtype", COSINE_ERROR)
@pytest.mark.parametrize(("d_m", "d_t"), [*WIDTHS, (4096, 2048), (5120, 4096), (257, 64)])
def test_cosine_and_gradient(d_m: int, d_t: int, dtype: torch.dtype) -> None:
    student, teacher = random_pair(37, d_m, d_t, dtype, seed=d_m + d_t)
    weight = random(37)
    cosine, gradient = on_gpu(student, teacher, weight)
    assert (cosine.double() - exact_cosine(student, teacher)).abs().max() < COSINE_ERROR[dtype]
    expected = exact_gradient(student, teacher, weight)
    assert gradient_error(gradient, expected, student, weight) < GRADIENT_ERROR[dtype]


@pytest.mark.parametrize(("d_m", "d_t"), [(256, 128), (260, 100)])
def test_zero_ignored_and_nan_tokens(d_m: int, d_t: int) -> None:
    student, teacher = random_pair(6, d_m, d_t, torch.bfloat16)
    student[0], teacher[1], student[2], student[5] = 0, 0, torch.nan, torch.nan
    mask = torch.tensor([False, False, True, True, False, False])
    cosine, gradient = on_gpu(student, teacher, torch.ones(6), mask)
    assert not cosine[:4].any() and not gradient[:4].any()
    assert cosine[4].isfinite() and cosine[5].isnan()
    assert gradient[4].isfinite().all() and gradient[5].isnan().all()


@pytest.mark.parametrize("scale", [1e-4, 1e4])
@pytest.mark.parametrize(("d_m", "d_t"), [(256, 128), (260, 100)])
def test_small_and_large_fp16_rows(d_m: int, d_t: int, scale: float) -> None:
    student, teacher = random_pair(8, d_m, d_t, torch.float64)
    student, teacher = (student * scale).half(), (teacher * scale).half()
    weight = torch.full((8,), scale, dtype=torch.float64)
    cosine, gradient = on_gpu(student, teacher, weight)
    assert (cosine - exact_cosine(student, teacher)).abs().max() < 1e-5
    assert relative_error(gradient, exact_gradient(student, teacher, weight)) < 2e-3


@pytest.mark.parametrize(("d_m", "d_t"), [(4096, 2048), (2048, 576)])
def test_two_runs_give_the_same_bits(d_m: int, d_t: int) -> None:
    student, teacher = random_pair(4096, d_m, d_t, torch.bfloat16)
    first, second = (on_gpu(student, teacher, random(4096)) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@pytest.mark.parametrize(("d_m", "d_t"), [(512, 256), (512, 144)])
@pytest.mark.parametrize("num_tokens", [0, 1, 3, 200_001])
def test_token_counts(num_tokens: int, d_m: int, d_t: int) -> None:
    student, teacher = random_pair(num_tokens, d_m, d_t, torch.bfloat16)
    weight = random(num_tokens)
    cosine, gradient = on_gpu(student, teacher, weight)
    exact = exact_cosine(student, teacher)
    torch.testing.assert_close(cosine.double(), exact, rtol=0, atol=2e-3)
    expected = exact_gradient(student, teacher, weight)
    assert gradient_error(gradient, expected, student, weight) < 1e-2


@pytest.mark.parametrize(("d_m", "d_t"), [(4096, 2048), (4096, 1000)])
def test_past_two_to_the_31_elements(d_m: int, d_t: int) -> None:
    num_tokens = 2**31 // d_m + 8
    if torch.cuda.mem_get_info()[0] < 6 * num_tokens * d_m * 2:
        pytest.skip("needs about 26 GB of GPU memory")
    few_student, few_teacher = random_pair(8, d_m, d_t, torch.bfloat16)
    student = torch.ones(num_tokens, d_m, dtype=torch.bfloat16, device="cuda")
    teacher = torch.ones(num_tokens, d_t, dtype=torch.bfloat16, device="cuda")
    student[-8:], teacher[-8:] = few_student.cuda(), few_teacher.cuda()
    student.requires_grad_()
    cosine = interpolated_cosine(student, teacher)
    (gradient,) = torch.autograd.grad(cosine, student, torch.ones_like(cosine))
    expected = on_gpu(few_student, few_teacher, torch.ones(8))
    assert torch.equal(cosine[-8:].cpu(), expected[0])
    assert torch.equal(gradient[-8:].cpu(), expected[1])


@pytest.mark.parametrize(("d_m", "d_t"), [(256, 128), (260, 100)])
def test_alignment_adds_to_the_incoming_gradient(d_m: int, d_t: int) -> None:
    student, teacher = random_pair(6, d_m, d_t, torch.bfloat16)
    hidden = student.view(3, 2, d_m).cuda().requires_grad_()
    other = torch.zeros_like(hidden, requires_grad=True)
    scale = torch.tensor(0.5, device="cuda")
    out, _ = align_hidden_state(hidden, teacher.view(3, 2, d_t).cuda(), scale)
    incoming = random(3, 2, d_m).bfloat16()
    (out + other).backward(incoming.cuda())
    assert other.grad is not None and torch.equal(other.grad.cpu(), incoming)
    direction = exact_gradient(student, teacher, torch.full((6,), -0.5))
    assert hidden.grad is not None
    expected = incoming.double() + direction.view_as(incoming)
    assert relative_error(hidden.grad.cpu(), expected) < 1e-2


def _step(hidden: Tensor, teacher: Tensor, scale: Tensor) -> Tensor:
    return align_hidden_state(hidden * 2, teacher, scale)[0].square().sum()


@pytest.mark.parametrize(("d_m", "d_t"), [(256, 128), (260, 100)])
def test_compile_and_recompute(d_m: int, d_t: int) -> None:
    hidden = random(4, 2, d_m).float().cuda().requires_grad_()
    rest = random(4, 2, d_t).float().cuda(), torch.tensor(0.5, device="cuda")
    (expected,) = torch.autograd.grad(_step(hidden, *rest), hidden)
    compiled = torch.compile(_step, fullgraph=True)
    (gradient,) = torch.autograd.grad(compiled(hidden, *rest), hidden)
    torch.testing.assert_close(gradient, expected)
    checkpoint(_step, hidden, *rest, use_reentrant=False).backward()
    assert hidden.grad is not None and torch.equal(hidden.grad, expected)


@pytest.mark.parametrize(("d_m", "d_t"), [(4096, 2048), (2048, 576)])
def test_extra_memory_below_one_percent_of_the_inputs(d_m: int, d_t: int) -> None:
    def random_rows(width: int) -> Tensor:
        return torch.randn(8192, width, device="cuda", dtype=torch.bfloat16)

    hidden, teacher, incoming = (
        random_rows(d_m).requires_grad_(),
        random_rows(d_t),
        random_rows(d_m),
    )
    inputs = 8192 * (2 * d_m + d_t) * 2
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out, _ = align_hidden_state(hidden, teacher, 0.1)
    torch.autograd.grad(out, hidden, incoming)
    result = 8192 * d_m * 2
    assert torch.cuda.max_memory_allocated() - before - result < inputs / 100


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_tensors_on_another_than_the_current_device() -> None:
    student, teacher = random_pair(8, 256, 128, torch.float32)
    with torch.cuda.device(0):
        cosine = interpolated_cosine(student.to("cuda:1"), teacher.to("cuda:1"))
    assert (cosine.cpu() - exact_cosine(student, teacher)).abs().max() < 1e-5
