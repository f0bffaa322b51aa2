"""Without any one CPU shim a run fails, unless the reason for the shim is documented here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.torch_version import TorchVersion

from megatron_let.compat.cpu_shims import cpu_shims
from tests.helpers.runs import ROOT, run_forked

# Shims without which this small run still ends -> what they are for.
SILENT = {
    "torch.cuda:manual_seed": "without it every rank draws the same dropout",
    "megatron.core.tensor_parallel.random:_set_cuda_rng_state": (
        "torch would queue the call until CUDA starts, and tensor-parallel ranks share a mask"
    ),
    "megatron.core.transformer.moe.token_dispatcher:maybe_move_tensor_to_cpu": (
        "called with several ranks of experts only"
    ),
    "torch.distributed.device_mesh:DeviceMesh.from_group": "called with --use-torch-fsdp2 only",
    "torch.cuda:get_device_properties": "called with sequence or context parallelism only",
}

if TorchVersion(torch.__version__) >= (2, 13):
    SILENT["torch.cuda:is_current_stream_capturing"] = "called by torch's Adam before torch 2.13"


@pytest.mark.distributed
def test_every_shim_is_needed_or_documented(tmp_path: Path, teacher: Path, data: Path) -> None:
    result = tmp_path / "codes.json"
    # DeepSpeed's import sets it to 1, and then is_available() calls device_count(), also a shim.
    variables = {"TEACHER": str(teacher), "PYTORCH_NVML_BASED_CUDA_CHECK": "0"}
    code, log = run_forked(
        "tests.helpers.without_shims", result,
        "--config", ROOT / "configs/tiny.yaml", "--data-path", data,
        "--train-iters", 3, "--save-interval", 2, "--eval-interval", 2,
        "--hidden-dropout", 0.1, "--attention-dropout", 0.1,
        folder=tmp_path, seconds=1800, **variables,
    )  # fmt: skip
    assert code == 0, log[-3000:]
    codes = json.loads(result.read_text())
    assert codes.pop("None") == 0, "the run fails with all of them"
    assert codes.keys() == cpu_shims().keys()
    silent = {target for target, code in codes.items() if code == 0}
    assert silent == set(SILENT)
