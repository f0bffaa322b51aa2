"""The kernels' machine code for A100 and H100, compiled without a GPU."""

from __future__ import annotations

import csv
from dataclasses import asdict
from functools import cache
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: a CPU build of torch has none")

import triton

from megatron_let.losses import cosine_triton
from tools import kernel_report
from tools.kernel_report import DTYPES, RESULTS, Resources, compile_kernel, measure, minimal_bytes

pytestmark = pytest.mark.medium

# A block-diagonal pair, the gather with d_M > 2 d_T, with d_M < 2 d_T, and with d_M < d_T.
WIDTHS = [(4096, 2048), (2048, 576), (5120, 4096), (576, 2048)]


@cache
def machine_code(d_m: int, d_t: int, dtype: str, sm: int) -> tuple[Resources, Resources]:
    """Return the resources of forward and backward."""
    student = torch.empty(1, d_m, dtype=DTYPES[dtype], device="meta")
    plans = cosine_triton.plan_forward(student, d_t), cosine_triton.plan_backward(student, d_t)
    forward, backward = (measure(plan, dtype, sm) for plan in plans)
    return forward, backward


@pytest.mark.parametrize("sm", [80, 90])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(("d_m", "d_t"), WIDTHS)
def test_registers_do_not_spill(d_m: int, d_t: int, dtype: str, sm: int) -> None:
    for resources in machine_code(d_m, d_t, dtype, sm):
        assert resources.spill_bytes == 0
        # At least 12 warps fit on a multiprocessor, with some kilobytes in flight each.
        assert resources.registers <= 65536 // (12 * 32)


@pytest.mark.parametrize("sm", [80, 90])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_block_kernels_stream_16_bytes_per_thread(dtype: str, sm: int) -> None:
    forward, backward = machine_code(4096, 2048, dtype, sm)
    assert forward.kernel == "cosine_forward_block" and backward.kernel == "cosine_backward_block"
    # 16 bytes of the student; the teacher has half the columns and loads of half the width.
    assert forward.loads_16_byte * 2 == forward.loads
    # Five loads per token: student, gradient; teacher in 8 bytes; two coefficients.
    assert backward.loads_16_byte * 5 == backward.loads * 2
    assert backward.stores_16_byte == backward.stores


@pytest.mark.parametrize("sm", [80, 90])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_gather_backward_streams_16_bytes_per_thread(dtype: str, sm: int) -> None:
    _, backward = machine_code(2048, 576, dtype, sm)
    assert backward.kernel == "cosine_backward_gather"
    tokens = cosine_triton.plan_backward(torch.empty(1, 2048, dtype=DTYPES[dtype]), 576).constants[
        "TOKENS"
    ]
    assert backward.loads_16_byte == 2 * tokens  # student and incoming gradient
    assert backward.stores_16_byte == backward.stores == tokens


@pytest.mark.parametrize(("d_m", "d_t"), WIDTHS)
def test_fp64_compiles(d_m: int, d_t: int) -> None:
    student = torch.empty(1, d_m, dtype=torch.float64, device="meta")
    assert compile_kernel(cosine_triton.plan_forward(student, d_t), "fp64", 90)
    assert compile_kernel(cosine_triton.plan_backward(student, d_t), "fp64", 90)


def test_shifts_between_the_columns_of_a_thread_use_no_shared_memory() -> None:
    _, backward = machine_code(2048, 576, "bf16", 90)
    assert backward.shared_bytes == 0


def test_minimal_bytes_equal_values_by_hand() -> None:
    # 3 tokens, 10 and 4 columns of 2 bytes; three fp32 numbers per token out, two in.
    assert minimal_bytes(3, 10, 4, 2) == {
        "forward": 3 * (28 + 12), "backward": 3 * (68 + 8), "both": 3 * (96 + 20),
    }  # fmt: skip


def test_kernels_are_limited_by_memory_and_not_by_instructions() -> None:
    with (RESULTS / "cosine_interp_roofline.csv").open() as file:
        rows = list(csv.DictReader(file))
    fractions = [float(row[name]) for row in rows for name in row if name.endswith("fraction")]
    assert len(fractions) == 2 * 2 * len(kernel_report.SHAPES)
    assert max(fractions) < 0.7


def committed() -> list[dict[str, str]]:
    with (RESULTS / "cosine_interp_resources.csv").open() as file:
        return list(csv.DictReader(file))


def test_committed_report_covers_every_kernel_without_a_spill() -> None:
    rows = committed()
    expected = len(kernel_report.WIDTHS) * len(DTYPES) * len(kernel_report.GPUS) * 2
    assert len(rows) == expected
    assert {row["spill_bytes"] for row in rows} == {"0"}


@pytest.mark.parametrize(("d_m", "d_t"), WIDTHS)
def test_committed_report_matches_the_kernels(d_m: int, d_t: int) -> None:
    rows = committed()
    if rows[0]["triton"] != triton.__version__:
        pytest.skip(f"compiled by Triton {rows[0]['triton']}, here is {triton.__version__}")

    def same(row: dict[str, str], resources: dict[str, Any]) -> bool:
        return all(row[name] == str(value) for name, value in resources.items())

    for resources in machine_code(d_m, d_t, "bf16", 90):
        assert any(same(row, asdict(resources)) for row in rows), (
            f"{resources}: run python tools/kernel_report.py and commit its CSV"
        )
