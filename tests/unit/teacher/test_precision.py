"""`--let-teacher-dtype auto` follows what the processor and oneDNN's limit can compute."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from megatron_let.teacher import precision


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    return monkeypatch


@pytest.mark.parametrize(
    ("onednn", "avx512_bf16", "amx", "expected"),
    [
        (True, True, False, "bf16"),
        (True, False, True, "bf16"),
        # AVX-512 without bf16 instructions, which oneDNN counts as support.
        (True, False, False, "fp32"),
        # Instructions that ONEDNN_MAX_CPU_ISA forbids.
        (False, True, True, "fp32"),
    ],
)
def test_dtype_of_cpu_follows_its_instructions_and_onednn(
    onednn: bool, avx512_bf16: bool, amx: bool, expected: str, without_gpu: pytest.MonkeyPatch
) -> None:
    without_gpu.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    without_gpu.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
    without_gpu.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    without_gpu.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    dtype, reason = precision.default_dtype()
    assert dtype == expected and ("emulates" in reason) == (expected == "fp32")


def test_dtype_on_gpu_is_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert precision.default_dtype()[0] == "bf16"


def test_shims_that_claim_a_gpu_do_not_change_the_cpus_dtype(
    without_gpu: pytest.MonkeyPatch,
) -> None:
    without_gpu.setattr(torch.cuda, "is_available", lambda: True)
    without_gpu.setattr(precision, "cpu_has_bf16", lambda: False)
    assert precision.default_dtype()[0] == "fp32"


def test_dtype_without_onednn_is_fp32(without_gpu: pytest.MonkeyPatch) -> None:
    without_gpu.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert precision.default_dtype()[0] == "fp32"


@pytest.mark.medium
def test_limit_of_onednn_gives_fp32_on_any_processor() -> None:
    code = "from megatron_let.teacher.precision import cpu_has_bf16; print(cpu_has_bf16())"
    variables = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == "False"
