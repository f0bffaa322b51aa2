"""The Triton kernels under Triton's interpreter, against the dense fp64 reference.

The interpreter is selected when Triton is imported, so the tests run in a separate process, which
the one test that pytest collects here starts.
"""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

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

pytestmark = pytest.mark.medium

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytest.importorskip("triton", reason="Triton is not installed: a CPU build of torch has none")
if INTERPRETED:
    from megatron_let.losses import cosine_triton


@pytest.mark.skipif(
    INTERPRETED, reason="runs under Triton's interpreter already, which this test starts"
)
def test_kernels_pass_in_a_process_with_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    run = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert " passed" in run.stdout


class InterpretedKernels:
    """Each test compares the launch functions with equations 4 and 6 in fp64."""

    @pytest.fixture(autouse=True)
    def poison(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Fill outputs with NaN, so that an element that no program writes is found."""

        empty = torch.empty
        monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))

    @staticmethod
    def cosine_and_gradient(
        student: Tensor, teacher: Tensor, weight: Tensor, grad: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the cosine and `grad + weight * d sum(cos) / d student`; `weight` is 0-dim."""
        grad = torch.zeros_like(student) if grad is None else grad
        gradient, cosine = cosine_triton.cosine_alignment(student, teacher, -weight, grad)
        alone = cosine_triton.cosine(student, teacher)
        torch.testing.assert_close(alone, cosine, rtol=0, atol=0, equal_nan=True)
        return cosine, gradient

    def check(self, student: Tensor, teacher: Tensor, grad: Tensor) -> None:
        weight, dtype = random(1)[0], student.dtype
        cosine, gradient = self.cosine_and_gradient(student, teacher, weight, grad)
        assert gradient.dtype == dtype and gradient.is_contiguous()
        exact = exact_cosine(student, teacher)
        torch.testing.assert_close(cosine.double(), exact, rtol=0, atol=COSINE_ERROR[dtype])
        weights = weight.expand(len(student))
        expected = exact_gradient(student, teacher, weights) + grad
        assert gradient_error(gradient, expected, student, weights) < GRADIENT_ERROR[dtype]

    @pytest.mark.parametrize("dtype", COSINE_ERROR)
    @pytest.mark.parametrize(("d_m", "d_t"), WIDTHS)
    def test_cosine_and_gradient_match_fp64(self, d_m: int, d_t: int, dtype: torch.dtype) -> None:
        student, teacher = random_pair(5, d_m, d_t, dtype, seed=d_m + d_t)
        self.check(student, teacher, random(5, d_m).to(dtype))

    @pytest.mark.parametrize("num_tokens", [0, 1, 2, 3, 4, 5, 9])
    @pytest.mark.parametrize(("d_m", "d_t"), [(300, 150), (300, 110), (70, 200)])
    def test_token_counts_around_the_tile_match_fp64(
        self, d_m: int, d_t: int, num_tokens: int
    ) -> None:
        student, teacher = random_pair(num_tokens, d_m, d_t, torch.float32)
        self.check(student, teacher, random(num_tokens, d_m).float())

    @pytest.mark.parametrize(
        ("d_m", "d_t"), [(256, 128), (258, 129), (512, 512), (260, 64), (512, 96), (64, 257)]
    )
    def test_widths_around_the_tile_match_fp64(self, d_m: int, d_t: int) -> None:
        student, teacher = random_pair(3, d_m, d_t, torch.bfloat16)
        self.check(student, teacher, random(3, d_m).bfloat16())

    @settings(max_examples=40, deadline=None)
    @given(st.integers(1, 90), st.integers(2, 90), st.integers(1, 6), st.integers(0, 2**16))
    def test_any_widths_match_fp64(self, d_m: int, d_t: int, num_tokens: int, seed: int) -> None:
        student, teacher = random_pair(num_tokens, d_m, d_t, torch.float64, seed)
        self.check(student, teacher, random(num_tokens, d_m))

    @pytest.mark.parametrize(("d_m", "d_t"), [(48, 24), (40, 15)])
    def test_strided_inputs_equal_contiguous_ones(self, d_m: int, d_t: int) -> None:
        student, teacher = random_pair(6, d_m, d_t, torch.float32)
        grad = random(6, d_m).float()
        weight = random(1)[0]
        expected = self.cosine_and_gradient(student, teacher, weight, grad)
        layouts = {
            "rows apart": lambda x: torch.stack([x, torch.full_like(x, 9)], 1)[:, 0],
            "columns apart": lambda x: x.T.contiguous().T,
            "shard of a sequence": lambda x: torch.cat([x * 0 + 9, x, x * 0 + 9])[6:12],
        }
        inputs = {"student": student, "teacher": teacher, "grad": grad}
        for layout, name in product(layouts.values(), inputs):
            strided = {**inputs, name: layout(inputs[name])}
            result = self.cosine_and_gradient(**strided, weight=weight)
            assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))

    @pytest.mark.parametrize(
        ("d_m", "d_t"), [(48, 24), (256, 64), (40, 15), (512, 96), (15, 40), (1, 4), (320, 64)]
    )
    def test_columns_and_rows_outside_the_inputs_are_not_read(self, d_m: int, d_t: int) -> None:
        student, teacher = random_pair(5, d_m, d_t, torch.float32)
        grad = random(5, d_m).float()
        expected = self.cosine_and_gradient(student, teacher, torch.ones(()), grad)
        flanked = [F.pad(x, (8, 8, 1, 1), value=torch.nan)[1:-1, 8:-8] for x in (student, teacher)]
        result = self.cosine_and_gradient(*flanked, torch.ones(()), grad)
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))

    @pytest.mark.parametrize(("d_m", "d_t"), [(48, 24), (40, 15)])
    def test_expanded_gradient_matches_fp64(self, d_m: int, d_t: int) -> None:
        student, teacher = random_pair(3, d_m, d_t, torch.float32)
        self.check(student, teacher, torch.ones(()).expand(3, d_m))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    @pytest.mark.parametrize(("d_m", "d_t"), [(48, 24), (40, 15)])
    def test_zero_vectors_have_cosine_and_gradient_zero(
        self, d_m: int, d_t: int, dtype: torch.dtype
    ) -> None:
        student, teacher = random_pair(4, d_m, d_t, dtype)
        student[0], teacher[1], student[2], teacher[2] = 0, 0, 0, 0
        cosine, gradient = self.cosine_and_gradient(student, teacher, torch.ones(()))
        assert cosine[:3].tolist() == [0, 0, 0] and cosine[3] != 0
        assert not gradient[:3].any() and gradient[3].any()

    @pytest.mark.parametrize(("d_m", "d_t"), [(48, 24), (40, 15)])
    def test_nan_propagates_to_its_token_alone(self, d_m: int, d_t: int) -> None:
        student, teacher = random_pair(2, d_m, d_t, torch.float32)
        student[1, -1] = torch.nan
        cosine, gradient = self.cosine_and_gradient(student, teacher, torch.ones(()))
        assert cosine.isnan().tolist() == [False, True]
        assert gradient[0].isfinite().all() and gradient[1].isnan().all()

    @pytest.mark.parametrize("scale", [1e-4, 1e4])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    @pytest.mark.parametrize(("d_m", "d_t"), [(260, 130), (321, 130)])
    def test_small_and_large_rows_match_fp64(
        self, d_m: int, d_t: int, dtype: torch.dtype, scale: float
    ) -> None:
        student, teacher = random_pair(4, d_m, d_t, torch.float64)
        student, teacher = (student * scale).to(dtype), (teacher * scale).to(dtype)
        # Scaled as a loss scale would, so that fp16 holds the gradient of large rows.
        weight = torch.tensor(scale, dtype=torch.float64)
        cosine, gradient = self.cosine_and_gradient(student, teacher, weight)
        assert (cosine - exact_cosine(student, teacher)).abs().max() < 1e-5
        expected = exact_gradient(student, teacher, weight.expand(4))
        assert relative_error(gradient, expected) < GRADIENT_ERROR[dtype]

    @pytest.mark.parametrize(("d_m", "d_t"), [(256, 128), (321, 130)])
    def test_two_runs_and_any_batch_give_the_same_bits(self, d_m: int, d_t: int) -> None:
        student, teacher = random_pair(7, d_m, d_t, torch.bfloat16)
        grad, weight = random(7, d_m).bfloat16(), random(1)[0]
        first = self.cosine_and_gradient(student, teacher, weight, grad)
        again = self.cosine_and_gradient(student, teacher, weight, grad)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        alone = self.cosine_and_gradient(student[4:5], teacher[4:5], weight, grad[4:5])
        assert torch.equal(first[0][4:5], alone[0]) and torch.equal(first[1][4:5], alone[1])

    @pytest.mark.parametrize(("d_m", "d_t"), [(48, 24), (40, 15)])
    def test_inputs_are_not_modified(self, d_m: int, d_t: int) -> None:
        student, teacher = random_pair(3, d_m, d_t, torch.float32)
        inputs = [student, teacher, random(3, d_m).float()]
        kept = [x.clone() for x in inputs]
        self.cosine_and_gradient(inputs[0], inputs[1], torch.ones(()), inputs[2])
        assert all(torch.equal(a, b) for a, b in zip(inputs, kept, strict=True))

    @pytest.mark.parametrize(("d_m", "d_t"), [(48, 24), (40, 15)])
    def test_rows_past_two_to_the_31_elements_equal_adjacent_ones(self, d_m: int, d_t: int) -> None:
        apart = 2**30 + 16
        student, teacher = random_pair(3, d_m, d_t, torch.float32)
        grad = random(3, d_m).float()
        far = far_apart(student, apart), far_apart(teacher, apart), far_apart(grad, apart)
        weight = torch.ones(())
        expected = self.cosine_and_gradient(student, teacher, weight, grad)
        result = self.cosine_and_gradient(far[0], far[1], weight, far[2])
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))

    def test_block_kernel_is_selected_for_integer_ratios(self) -> None:
        block = [(64, 64), (48, 24), (96, 24), (4096, 2048)]
        gather = [(48, 16), (64, 8), (24, 48), (2048, 576), (2048, 768), (7, 5)]
        assert all(cosine_triton.is_block_diagonal(*widths) for widths in block)
        assert not any(cosine_triton.is_block_diagonal(*widths) for widths in gather)

    def test_widths_whose_product_overflows_raise(self) -> None:
        with pytest.raises(ValueError, match="below 2\\*\\*31"):
            cosine_triton.cosine(torch.zeros(1, 50_000), torch.zeros(1, 50_001))


def far_apart(rows: Tensor, stride: int) -> Tensor:
    """Return the rows `stride` elements apart, in memory that is reserved but not touched."""
    storage = torch.UntypedStorage(((len(rows) - 1) * stride + rows.shape[1]) * rows.element_size())
    view = torch.empty(0, dtype=rows.dtype).set_(storage, 0, rows.shape, (stride, 1))
    return view.copy_(rows)


if INTERPRETED:
    TestInterpretedKernels = InterpretedKernels
