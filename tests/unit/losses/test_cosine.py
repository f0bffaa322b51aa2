"""The cosine loss on the CPU against equations 4 and 6 written out densely in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_let.losses.cosine import cosine_loss, cosine_reference, token_cosine
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


def run(
    student: Tensor, teacher: Tensor, scale: float = -1.0, incoming: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return `incoming - scale * d(sum of cos) / d student` and the cosine."""
    incoming = torch.zeros_like(student) if incoming is None else incoming
    factor = torch.tensor(scale, dtype=torch.float64)
    gradient, (cosine,) = cosine_loss(student, teacher, factor, incoming)
    assert torch.equal(cosine, token_cosine(student, teacher))
    return gradient, cosine


@pytest.mark.parametrize("dtype", COSINE_ERROR)
@pytest.mark.parametrize(("d_m", "d_t"), WIDTHS)
def test_cosine_and_gradient_match_fp64(d_m: int, d_t: int, dtype: torch.dtype) -> None:
    student, teacher = random_pair(5, d_m, d_t, dtype, seed=d_m + d_t)
    gradient, cosine = run(student, teacher)
    assert cosine.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (cosine.double() - exact_cosine(student, teacher)).abs().max() < COSINE_ERROR[dtype]
    ones = torch.ones(5)
    expected = exact_gradient(student, teacher, ones)
    assert gradient.dtype == dtype
    assert gradient_error(gradient, expected, student, ones) < GRADIENT_ERROR[dtype]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(2, 40), st.integers(0, 5), st.integers(0, 2**16))
def test_any_widths_and_token_counts_match_fp64(
    d_m: int, d_t: int, num_tokens: int, seed: int
) -> None:
    student, teacher = random_pair(num_tokens, d_m, d_t, torch.float64, seed)
    incoming = random(num_tokens, d_m)
    gradient, cosine = run(student, teacher, 0.7, incoming)
    torch.testing.assert_close(cosine, exact_cosine(student, teacher), rtol=0, atol=1e-12)
    weight = torch.full((num_tokens,), -0.7, dtype=torch.float64)
    expected = exact_gradient(student, teacher, weight)
    assert gradient_error(gradient - incoming, expected, student, weight) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sum_is_rounded_once(dtype: torch.dtype) -> None:
    student, teacher = random_pair(6, 321, 130, dtype)
    incoming = random(6, 321).to(dtype) * 1e-3
    gradient, _ = run(student, teacher, 3.0, incoming)
    expected = incoming.double() + exact_gradient(student, teacher, torch.full((6,), -3.0))
    assert (gradient != expected.to(dtype)).float().mean() < 0.01


@pytest.mark.parametrize("scale", [1e-4, 1e4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_small_and_large_rows_match_fp64(dtype: torch.dtype, scale: float) -> None:
    student, teacher = random_pair(4, 321, 130, torch.float64)
    student, teacher = (student * scale).to(dtype), (teacher * scale).to(dtype)
    # Scaled as a loss scale would, so that fp16 can represent the gradient of large rows.
    gradient, cosine = run(student, teacher, -scale)
    assert (cosine - exact_cosine(student, teacher)).abs().max() < 1e-5
    expected = exact_gradient(student, teacher, torch.full((4,), scale))
    assert relative_error(gradient, expected) < GRADIENT_ERROR[dtype]


def test_loss_scale_prevents_fp16_underflow_of_the_direction() -> None:
    student, teacher = random_pair(4, 48, 24, torch.float64)
    student, teacher = (student * 1e4 / student.abs().max()).half(), teacher.half()
    gradient, _ = run(student, teacher, 2.0**16 * 1e-2)
    expected = exact_gradient(student, teacher, torch.full((4,), -(2.0**16) * 1e-2))
    assert relative_error(gradient, expected) < 2e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zero_vectors_have_cosine_and_gradient_zero(dtype: torch.dtype) -> None:
    student, teacher = random_pair(3, 12, 7, dtype)
    student[0], teacher[1] = 0, 0
    gradient, cosine = run(student, teacher)
    assert cosine[:2].tolist() == [0, 0] and cosine[2] != 0
    assert not gradient[:2].any() and gradient[2].any()


def test_nan_propagates_to_its_token_alone() -> None:
    student, teacher = random_pair(2, 12, 7, torch.float32)
    student[1, 3] = torch.nan
    gradient, (cosine,) = cosine_loss(student, teacher, torch.tensor(1.0), torch.zeros(2, 12))
    assert cosine.isnan().tolist() == [False, True]
    assert gradient[0].isfinite().all() and gradient[1].isnan().any()


def test_many_tokens_in_chunks_match_fp64() -> None:
    student, teacher = random_pair(200_000, 6, 4, torch.float32)
    gradient, cosine = run(student, teacher)
    assert (cosine - exact_cosine(student, teacher)).abs().max() < 1e-5
    assert relative_error(gradient, exact_gradient(student, teacher, torch.ones(200_000))) < 1e-5


def test_leading_dimensions_do_not_change_the_result() -> None:
    student, teacher = random_pair(6, 24, 10, torch.float64)
    expected = run(student, teacher)
    for shape in ((3, 2), (6, 1, 1)):
        shaped = run(student.view(*shape, 24), teacher.view(*shape, 10))
        assert shaped[0].shape == (*shape, 24) and shaped[1].shape == shape
        assert all(
            torch.equal(a.flatten(), b.flatten()) for a, b in zip(shaped, expected, strict=True)
        )
    token = run(student[4], teacher[4])
    assert token[1].shape == () and torch.equal(token[0], expected[0][4])


@pytest.mark.parametrize("layout", ["rows apart", "columns apart", "same row"])
def test_strided_inputs_equal_contiguous_ones(layout: str) -> None:
    student, teacher = random_pair(6, 24, 10, torch.float32)
    strided = {
        "rows apart": lambda x: torch.stack([x, torch.full_like(x, 9)], 1)[:, 0],
        "columns apart": lambda x: x.T.contiguous().T,
        "same row": lambda x: x[:1].expand(6, -1),
    }[layout]
    result = run(strided(student), strided(teacher))
    expected = run(strided(student).contiguous(), strided(teacher).contiguous())
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_teacher_of_another_dtype_gives_the_students_dtypes(dtype: torch.dtype) -> None:
    student, teacher = random_pair(6, 24, 10, torch.float32)
    gradient, cosine = run(student, teacher.to(dtype))
    assert (gradient.dtype, cosine.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(cosine, run(student, teacher)[1], rtol=0, atol=1e-2)


def test_runs_and_sequence_shards_give_the_same_bits() -> None:
    student, teacher = random_pair(300, 2048, 576, torch.bfloat16)
    whole, again = (run(student, teacher) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    for start in range(0, 300, 100):
        shard = slice(start, start + 100)
        parts = run(student[shard], teacher[shard])
        assert all(torch.equal(a, b[shard]) for a, b in zip(parts, whole, strict=True))


def test_operator_passes_torchs_checks() -> None:
    student, teacher = random_pair(3, 12, 7, torch.float32)
    inputs = student, teacher, torch.tensor(0.3), random(3, 12).float()
    torch.library.opcheck(torch.ops.megatron_let.cosine_alignment, inputs)


def _doubled(hidden: Tensor, teacher: Tensor, scale: Tensor, grad: Tensor) -> list[Tensor]:
    gradient, values = cosine_loss(hidden * 2, teacher, scale, grad)
    return [gradient * 2, *values]


def test_compiles_without_a_graph_break() -> None:
    student, teacher = random_pair(6, 24, 10, torch.float32)
    inputs = student.view(3, 2, 24), teacher.view(3, 2, 10), torch.tensor(0.3), random(3, 2, 24)
    # A test of the CPU host, which disables dynamo, may have run in this process.
    with torch._dynamo.config.patch(disable=False):
        compiled = torch.compile(_doubled, backend="aot_eager", fullgraph=True)
        result = compiled(*inputs)
    torch.testing.assert_close(result, _doubled(*inputs))


def test_scale_is_never_read_on_the_host() -> None:
    # A fake tensor has no value: .item(), float() or a branch on it raises.
    with FakeTensorMode():
        hidden, teacher = torch.randn(3, 2, 24), torch.randn(3, 2, 10)
        gradient, (cosine,) = cosine_loss(hidden, teacher, torch.ones(()), hidden)
    assert gradient.shape == (3, 2, 24) and cosine.shape == (3, 2)


class _LargestTensor(TorchDispatchMode):
    """Records the bytes of the largest tensor that an operation creates, except in `ignored`."""

    def __init__(self, ignored: torch.dtype) -> None:
        super().__init__()
        self.ignored = ignored
        self.bytes = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.dtype != self.ignored:
                self.bytes = max(self.bytes, tensor.numel() * tensor.element_size())
        return result


def test_no_input_is_copied_whole_to_fp32() -> None:
    student, teacher = random_pair(8192, 512, 144, torch.bfloat16)
    with _LargestTensor(ignored=torch.bfloat16) as largest:
        token_cosine(student, teacher)
        cosine_reference(student, teacher, torch.tensor(1.0), torch.ones_like(student))
    # A copy of the student in fp32 is 16 MiB.
    assert 0 < largest.bytes <= 2**20
