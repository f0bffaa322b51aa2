"""The planner under ZeRO against DeepSpeed's estimators, by hand, and for the recipes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_let.cli.plan import main
from megatron_let.errors import LETError
from megatron_let.planner.estimate import Request
from megatron_let.planner.memory import Layout, StageMemory
from megatron_let.planner.sizes import GPUS, TEACHERS, TransformerSize
from megatron_let.planner.zero import (
    Zero,
    estimate_zero,
    zero_from_config,
    zero_memory,
)
from tests.helpers.deepspeed import needs_deepspeed
from tests.helpers.runs import ROOT, environment

pytestmark = pytest.mark.medium

GIB = 2**30
SIZE_7B = TransformerSize(32, 4096, 11008, 32, 32, 128, True, 49152)
PARAMS_7B = 32 * SIZE_7B.layer_params + 2 * SIZE_7B.embedding_params
LARGEST = SIZE_7B.embedding_params
ALONE = Request(SIZE_7B, None, 3, 1280, GPUS["a100-40g"])
DISTILLED = Request(SIZE_7B, TEACHERS["smollm2-1.7b"], 3, 1280, GPUS["a100-40g"])
OFFLOAD = {"offload_optimizer": True}


@pytest.fixture(autouse=True)
def without_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make its import fail, as on a machine without it."""
    monkeypatch.setitem(sys.modules, "deepspeed", None)


def layout(dp: int, tp: int = 1) -> Layout:
    return Layout(tp, 1, 1, dp, 1, 4, 64, "full")


def states(memory: StageMemory) -> int:
    return memory.params + memory.grads + memory.optimizer


@pytest.fixture(scope="module")
def estimators() -> dict[str, Any]:
    """Run DeepSpeed's estimators: (host, GPU[, largest layer]) bytes by name, on one node of 8."""
    code = f"""
import json
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as three
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs as two
P, L, bare = {PARAMS_7B}, {LARGEST}, {{"additional_buffer_factor": 1}}
print(json.dumps({{
    "2": two(P, 8, cpu_offload=False, **bare), "2 offload": two(P, 1, cpu_offload=True, **bare),
    "3": three(P, L, 8, cpu_offload=False, cpu_offload_params=False, **bare),
    "3 offload": three(P, L, 8, cpu_offload=True, cpu_offload_params=False, **bare),
    "3 offload all": three(P, L, 8, cpu_offload=True, cpu_offload_params=True, **bare),
}}))"""
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment(DS_ACCELERATOR="cpu"), text=True,
        capture_output=True, timeout=200,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


@needs_deepspeed
@pytest.mark.parametrize(
    ("name", "zero"),
    [
        ("3", Zero(3)),
        ("3 offload", Zero(3, offload_optimizer=True)),
        ("3 offload all", Zero(3, offload_optimizer=True, offload_param=True)),
    ],
)
def test_zero_3_states_agree_with_deepspeeds_estimator(
    name: str, zero: Zero, estimators: dict[str, Any]
) -> None:
    host, gpu, largest = estimators[name]
    found = zero_memory(ALONE, layout(dp=8), zero)
    # The planner counts the gathered largest layer and its gradient as buffers.
    assert states(found) == pytest.approx(gpu - largest, rel=0.05, abs=1)
    assert found.buffers > largest
    if zero.offload_optimizer:
        # The estimator adds 50 %; the planner counts the accumulated gradients separately.
        assert host < 8 * found.host < 1.5 * host


@needs_deepspeed
def test_zero_2_states_agree_with_deepspeeds_estimator(estimators: dict[str, Any]) -> None:
    _, gpu = estimators["2"]
    found = zero_memory(ALONE, layout(dp=8), Zero(2))
    # The estimator also counts a shard of bf16 gradients, which fp32 accumulation frees.
    assert states(found) == pytest.approx(gpu - 2 * PARAMS_7B / 8, rel=0.05)
    host, gpu = estimators["2 offload"]
    found = zero_memory(ALONE, layout(dp=1), Zero(2, **OFFLOAD))
    # The estimator does not count the fp32 gradient sum on the GPU.
    assert states(found) == pytest.approx(gpu + 4 * PARAMS_7B, rel=0.05)
    assert host < found.host < 1.5 * host


@pytest.mark.parametrize(
    ("zero", "dp", "params", "grads", "optimizer", "host"),
    [
        (Zero(0), 8, 2, 6, 12, 0),
        (Zero(1), 8, 2, 4.5, 1.5, 0),
        (Zero(2), 8, 2, 0.5, 1.5, 0),
        (Zero(3), 8, 0.25, 0.5, 1.5, 0),
        (Zero(1, **OFFLOAD), 2, 2, 6, 0, 9),
        (Zero(2, **OFFLOAD), 2, 2, 2, 0, 9),
        (Zero(3, **OFFLOAD), 2, 1, 0, 0, 10),
        (Zero(3, offload_param=True, **OFFLOAD), 2, 0, 0, 0, 11),
    ],
)
def test_bytes_per_parameter_equal_values_by_hand(
    zero: Zero, dp: int, params: float, grads: float, optimizer: float, host: float
) -> None:
    found = zero_memory(ALONE, layout(dp), zero)
    expected = [PARAMS_7B * share for share in (params, grads, optimizer, host)]
    assert [found.params, found.grads, found.optimizer, found.host] == pytest.approx(
        expected, abs=8
    )


def test_tensor_parallel_shards_the_states_again() -> None:
    one, two = (zero_memory(ALONE, layout(4, tp), Zero(3)) for tp in (1, 2))
    assert 2 * states(two) == pytest.approx(states(one), abs=16)


def test_pinned_buffers_round_up_to_powers_of_two() -> None:
    # fp32 master weights and gradients of 25.6 GiB take 32, bf16 weights of 12.8 take 16.
    found = zero_memory(ALONE, layout(1), Zero(2, pin_memory=True, **OFFLOAD))
    assert found.host == 80 * GIB + 8 * PARAMS_7B


def test_sharding_saves_memory_for_a_large_teacher_only() -> None:
    def teacher_bytes(request: Request, shard: bool) -> int:
        memory = zero_memory(request, layout(8), Zero(3, shard_teacher=shard))
        return memory.teacher_weights + memory.teacher_buffers

    small = Request(SIZE_7B, TEACHERS["smollm2-135m"], 3, 1280, GPUS["a100-40g"])
    assert teacher_bytes(DISTILLED, True) < teacher_bytes(DISTILLED, False)
    assert teacher_bytes(small, True) > teacher_bytes(small, False)


def test_step_time_is_that_of_the_passes_with_and_without_teacher() -> None:
    found = estimate_zero(DISTILLED, layout(8), Zero(3))
    passes = 64 * (found.costs.forward[0] + found.costs.backward[0])
    assert found.baseline_seconds == pytest.approx(passes)
    assert found.seconds == {"aligned-stage": pytest.approx(passes + 64 * found.costs.teacher)}
    assert estimate_zero(ALONE, layout(8), Zero(3)).seconds == {}


def test_missing_config_keys_take_deepspeeds_defaults() -> None:
    found = zero_from_config({"zero_optimization": {"stage": 3}}, shard_teacher=True)
    assert found == Zero(3, overlap_comm=True, shard_teacher=True)
    section = {
        "stage": 2, "reduce_bucket_size": 1e6, "overlap_comm": True,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
    }  # fmt: skip
    found = zero_from_config({"zero_optimization": section}, shard_teacher=False)
    assert found == Zero(2, True, False, True, 1_000_000, overlap_comm=True)


def test_nvme_offload_raises() -> None:
    section = {"stage": 3, "offload_optimizer": {"device": "nvme"}}
    with pytest.raises(LETError, match="nvme"):
        zero_from_config({"zero_optimization": section}, shard_teacher=False)


# The recipes


def plan(recipe: str, gpus: int, gpu: str, *flags: str) -> int:
    path = str(ROOT / f"configs/{recipe}.yaml")
    return main(["--config", path, "--gpus", str(gpus), "--gpu", gpu, *flags])


@pytest.mark.parametrize(
    ("recipe", "gpus", "gpu", "host"),
    [
        ("let_7b_deepspeed", 8, "a100-40g", 0),
        ("let_7b_deepspeed_1gpu", 1, "a100-80g", 131),
    ],
)
def test_deepspeed_recipe_fits_with_10_percent_free(
    recipe: str, gpus: int, gpu: str, host: float, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(recipe, gpus, gpu, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    (memory,) = found["memory_gib"]
    assert found["fits"] and memory["total"] < 0.9 * GPUS[gpu].memory / GIB
    assert memory["host"] == pytest.approx(host, abs=1)
    assert found["ratio"].keys() == {"aligned-stage"} and found["assumptions"]
    # The recipe's header says how much host memory it needs.
    header = Path(ROOT / f"configs/{recipe}.yaml").read_text().partition("model:")[0]
    assert f"{host} GiB" in header or not host


def test_printed_plan_lists_assumptions(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("let_7b_deepspeed_1gpu", 1, "a100-80g") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "131 GiB of host memory" in text and "ZeRO-2" in text
    assert "without ZeRO's communication" in text and "powers of two" in text


def test_recipe_on_a_smaller_gpu_returns_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("let_7b_deepspeed_1gpu", 1, "a100-40g") == 1
    assert "does NOT fit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--sweep",), "--sweep"),
        (("--plot", "x.svg"), "--plot"),
        (("--pp", "2"), "--pipeline-model-parallel-size 2"),
        (("--vpp", "2"), "PP 1"),
    ],
)
def test_pipelines_under_deepspeed_return_2(
    flags: tuple[str, ...], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan("let_7b_deepspeed", 8, "a100-40g", *flags) == 2
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1
