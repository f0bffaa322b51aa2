"""The kernels' machine code for A100 and H100, compiled without a GPU."""

from __future__ import annotations

import csv
from functools import cache
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: a CPU build of torch has none")

import triton

from megatron_let.losses import cosine_triton
from tools import kernel_report
from tools.kernel_report import DTYPES, RESULTS, compile_kernel, measure, minimal_bytes

pytestmark = pytest.mark.medium

# A block-diagonal pair, the gather with d_M > 2 d_T, with d_M < 2 d_T, and with d_M < d_T.
WIDTHS = [(4096, 2048), (2048, 576), (5120, 4096), (576, 2048)]


@cache
def machine_code(d_m: int, d_t: int, dtype: str, sm: int) -> dict[str, Any]:
    student = torch.empty(1, d_m, dtype=DTYPES[dtype], device="meta")
    return measure(cosine_triton.plan(student, d_t), dtype, sm)


@pytest.mark.parametrize("sm", [80, 90])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(("d_m", "d_t"), WIDTHS)
def test_registers_do_not_spill(d_m: int, d_t: int, dtype: str, sm: int) -> None:
    resources = machine_code(d_m, d_t, dtype, sm)
    assert resources["spill_bytes"] == 0
    # At least 12 warps fit on a multiprocessor, with some kilobytes in flight each.
    assert resources["registers"] <= 65536 // (12 * 32)


@pytest.mark.parametrize("sm", [80, 90])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_block_kernel_streams_16_bytes_per_thread(dtype: str, sm: int) -> None:
    resources = machine_code(4096, 2048, dtype, sm)
    assert resources["kernel"] == "cosine_block"
    plan = cosine_triton.plan(torch.empty(1, 4096, dtype=DTYPES[dtype]), 2048)
    # 16 bytes of the student and of the gradient. The teacher, which is loaded as often as the
    # student, has half the columns and loads of half the width; the scale is one more load.
    teacher_loads = resources["loads"] - resources["loads_16_byte"] - 1
    assert resources["loads_16_byte"] == teacher_loads + plan["TOKENS"]
    # The cosines are stored too.
    assert resources["stores_16_byte"] == resources["stores"] - 1


@pytest.mark.parametrize("sm", [80, 90])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_gather_kernel_streams_16_bytes_per_thread(dtype: str, sm: int) -> None:
    resources = machine_code(2048, 576, dtype, sm)
    assert resources["kernel"] == "cosine_gather"
    plan = cosine_triton.plan(torch.empty(1, 2048, dtype=DTYPES[dtype]), 576)
    tokens = plan["TOKENS"]
    # Student and incoming gradient, in each copy of the loop's body.
    assert resources["loads_16_byte"] > 0 and resources["loads_16_byte"] % (2 * tokens) == 0
    assert resources["stores_16_byte"] * 2 == resources["loads_16_byte"]
    assert resources["stores_16_byte"] == resources["stores"] - 1


@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize(("d_m", "d_t"), WIDTHS)
def test_fp64_and_cosine_alone_compile(d_m: int, d_t: int, gradient: bool) -> None:
    student = torch.empty(1, d_m, dtype=torch.float64, device="meta")
    assert compile_kernel(cosine_triton.plan(student, d_t, gradient), "fp64", 90)


def test_shared_memory_holds_no_more_than_the_sums_over_warps() -> None:
    # Three sums of four tokens and four warps; shifts between a thread's columns need none.
    assert machine_code(2048, 576, "bf16", 90)["shared_bytes"] <= 1024


def test_minimal_bytes_equal_values_by_hand() -> None:
    # 3 tokens, 10 and 4 columns of 2 bytes; a cosine in fp32 per token.
    assert minimal_bytes(3, 10, 4, 2) == {"forward": 3 * (28 + 4), "both": 3 * (68 + 4)}


def committed() -> list[dict[str, str]]:
    with (RESULTS / "cosine_interp_resources.csv").open() as file:
        return list(csv.DictReader(file))


def test_committed_report_covers_every_kernel_without_a_spill() -> None:
    rows = committed()
    expected = len(kernel_report.WIDTHS) * len(DTYPES) * len(kernel_report.GPUS)
    assert len(rows) == expected
    assert {row["spill_bytes"] for row in rows} == {"0"}


@pytest.mark.parametrize(("d_m", "d_t"), WIDTHS)
def test_committed_report_matches_the_kernels(d_m: int, d_t: int) -> None:
    rows = committed()
    if rows[0]["triton"] != triton.__version__:
        pytest.skip(
            f"the committed figures are of Triton {rows[0]['triton']}, not of {triton.__version__}"
        )

    def same(row: dict[str, str], resources: dict[str, Any]) -> bool:
        return all(row[name] == str(value) for name, value in resources.items())

    resources = machine_code(d_m, d_t, "bf16", 90)
    assert any(same(row, resources) for row in rows), (
        f"{resources}: run python tools/kernel_report.py and commit its CSV"
    )
