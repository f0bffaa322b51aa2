"""The compiled kernels on a GPU, against the dense fp64 reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_let.losses.cosine import cosine_loss, token_cosine
from tests.helpers.exact_cosine import (
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


def on_gpu(student: Tensor, teacher: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return the cosine and `scale * d sum(cos) / d student`, computed on the GPU."""
    student, teacher = student.cuda(), teacher.cuda()
    factor = torch.tensor(-scale, dtype=torch.float64, device=student.device)
    gradient, (cosine,) = cosine_loss(student, teacher, factor, torch.zeros_like(student))
    assert torch.equal(cosine, token_cosine(student, teacher))
    return cosine.cpu(), gradient.cpu()


@pytest.mark.parametrize("dtype", COSINE_ERROR)
@pytest.mark.parametrize(("d_m", "d_t"), [*WIDTHS, (4096, 2048), (5120, 4096), (257, 64)])
def test_cosine_and_gradient_match_fp64(d_m: int, d_t: int, dtype: torch.dtype) -> None:
    student, teacher = random_pair(37, d_m, d_t, dtype, seed=d_m + d_t)
    weight = torch.ones(37)
    cosine, gradient = on_gpu(student, teacher)
    assert (cosine.double() - exact_cosine(student, teacher)).abs().max() < COSINE_ERROR[dtype]
    expected = exact_gradient(student, teacher, weight)
    assert gradient_error(gradient, expected, student, weight) < GRADIENT_ERROR[dtype]


@pytest.mark.parametrize(("d_m", "d_t"), [(256, 128), (260, 100)])
def test_zero_tokens_give_zero_and_nan_tokens_give_nan(d_m: int, d_t: int) -> None:
    student, teacher = random_pair(4, d_m, d_t, torch.bfloat16)
    student[0], teacher[1] = 0, 0
    cosine, gradient = on_gpu(student, teacher)
    assert not cosine[:2].any() and not gradient[:2].any()
    student[3] = torch.nan
    incoming = torch.zeros(4, d_m, dtype=torch.bfloat16, device="cuda")
    scale = torch.ones((), device="cuda")
    gradient, (cosine,) = cosine_loss(student.cuda(), teacher.cuda(), scale, incoming)
    assert cosine[2].isfinite() and cosine[3].isnan()
    assert gradient[2].isfinite().all() and gradient[3].isnan().all()


@pytest.mark.parametrize("scale", [1e-4, 1e4])
@pytest.mark.parametrize(("d_m", "d_t"), [(256, 128), (260, 100)])
def test_small_and_large_fp16_rows_match_fp64(d_m: int, d_t: int, scale: float) -> None:
    student, teacher = random_pair(8, d_m, d_t, torch.float64)
    student, teacher = (student * scale).half(), (teacher * scale).half()
    weight = torch.full((8,), scale, dtype=torch.float64)
    cosine, gradient = on_gpu(student, teacher, scale)
    assert (cosine - exact_cosine(student, teacher)).abs().max() < 1e-5
    assert relative_error(gradient, exact_gradient(student, teacher, weight)) < 2e-3


@pytest.mark.parametrize(("d_m", "d_t"), [(4096, 2048), (2048, 576)])
def test_two_runs_give_the_same_bits(d_m: int, d_t: int) -> None:
    student, teacher = random_pair(4096, d_m, d_t, torch.bfloat16)
    first, second = (on_gpu(student, teacher) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@pytest.mark.parametrize(("d_m", "d_t"), [(512, 256), (512, 144)])
@pytest.mark.parametrize("num_tokens", [0, 1, 3, 200_001])
def test_any_token_count_matches_fp64(num_tokens: int, d_m: int, d_t: int) -> None:
    student, teacher = random_pair(num_tokens, d_m, d_t, torch.bfloat16)
    weight = torch.ones(num_tokens)
    cosine, gradient = on_gpu(student, teacher)
    exact = exact_cosine(student, teacher)
    torch.testing.assert_close(cosine.double(), exact, rtol=0, atol=2e-3)
    expected = exact_gradient(student, teacher, weight)
    assert gradient_error(gradient, expected, student, weight) < 1e-2


@pytest.mark.parametrize(("d_m", "d_t"), [(4096, 2048), (4096, 1000)])
def test_rows_past_two_to_the_31_elements_equal_first_ones(d_m: int, d_t: int) -> None:
    num_tokens = 2**31 // d_m + 8
    if torch.cuda.mem_get_info()[0] < 6 * num_tokens * d_m * 2:
        pytest.skip("less than 26 GB of GPU memory is free")
    few_student, few_teacher = random_pair(8, d_m, d_t, torch.bfloat16)
    student = torch.ones(num_tokens, d_m, dtype=torch.bfloat16, device="cuda")
    teacher = torch.ones(num_tokens, d_t, dtype=torch.bfloat16, device="cuda")
    student[-8:], teacher[-8:] = few_student.cuda(), few_teacher.cuda()
    incoming = torch.zeros_like(student)
    scale = torch.tensor(-1.0, dtype=torch.float64)
    gradient, (cosine,) = cosine_loss(student, teacher, scale, incoming)
    expected = on_gpu(few_student, few_teacher)
    assert torch.equal(cosine[-8:].cpu(), expected[0])
    assert torch.equal(gradient[-8:].cpu(), expected[1])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(("d_m", "d_t"), [(256, 128), (260, 100)])
def test_gradient_is_added_to_the_incoming_one(d_m: int, d_t: int, device: str) -> None:
    student, teacher = random_pair(6, d_m, d_t, torch.bfloat16)
    hidden, target = student.view(3, 2, d_m).cuda(), teacher.view(3, 2, d_t).cuda()
    incoming = random(3, 2, d_m).bfloat16()
    given = incoming.cuda()
    gradient, _ = cosine_loss(hidden, target, torch.tensor(0.5, device=device), given)
    assert torch.equal(given.cpu(), incoming)
    direction = exact_gradient(student, teacher, torch.full((6,), -0.5))
    expected = incoming.double() + direction.view_as(incoming)
    assert relative_error(gradient.cpu(), expected) < 1e-2


def _doubled(hidden: Tensor, teacher: Tensor, scale: Tensor, incoming: Tensor) -> list[Tensor]:
    gradient, values = cosine_loss(hidden * 2, teacher, scale, incoming)
    return [gradient * 2, *values]


@pytest.mark.parametrize(("d_m", "d_t"), [(256, 128), (260, 100)])
def test_compiles_without_a_graph_break(d_m: int, d_t: int) -> None:
    inputs = [random(4, 2, width).float().cuda() for width in (d_m, d_t, d_m)]
    inputs.insert(2, torch.tensor(0.5, device="cuda"))
    compiled = torch.compile(_doubled, fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), _doubled(*inputs))


@pytest.mark.parametrize(("d_m", "d_t"), [(4096, 2048), (2048, 576)])
def test_extra_memory_below_one_percent_of_the_inputs(d_m: int, d_t: int) -> None:
    hidden, teacher, incoming = (
        torch.randn(8192, width, device="cuda", dtype=torch.bfloat16) for width in (d_m, d_t, d_m)
    )
    inputs = 8192 * (2 * d_m + d_t) * 2
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    cosine_loss(hidden, teacher, torch.tensor(0.1), incoming)
    result = 8192 * d_m * 2
    assert torch.cuda.max_memory_allocated() - before - result < inputs / 100


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_tensors_on_another_device_match_fp64() -> None:
    student, teacher = random_pair(8, 256, 128, torch.float32)
    with torch.cuda.device(0):
        cosine = token_cosine(student.to("cuda:1"), teacher.to("cuda:1"))
    assert (cosine.cpu() - exact_cosine(student, teacher)).abs().max() < 1e-5
