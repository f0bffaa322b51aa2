"""The doctor says what is there, which path follows, and which node is unfit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_let.doctor import nodes
from megatron_let.doctor.machine import Check, as_json, check_machine
from megatron_let.host.device import Host
from tests.helpers.runs import ROOT, environment

CPU = Host(cuda=False, transformer_engine=False, fused_gradients=False)


def run_doctor(path: str = "") -> tuple[int, dict[str, dict[str, object]]]:
    result = subprocess.run(
        [sys.executable, "-m", "megatron_let.doctor", "--json"], cwd=ROOT, text=True,
        env=environment(PYTHONPATH=f"{ROOT}:{path}", CUDA_VISIBLE_DEVICES=""),
        stdout=subprocess.PIPE,
    )  # fmt: skip
    return result.returncode, {
        check["name"]: check for check in json.loads(result.stdout)["checks"]
    }


def test_tested_environment_is_fit() -> None:
    code, checks = run_doctor()
    assert code == 0
    assert {"Python", "torch", "GPUs", "Megatron", "patches", "NVIDIA Apex"} <= checks.keys()
    assert "gloo" in str(checks["GPUs"]["path"])
    assert str(checks["patches"]["found"]).startswith("all ")


def test_wrong_apex_is_named(tmp_path: Path) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex/__init__.py").touch()
    code, checks = run_doctor(str(tmp_path))
    assert "wrong apex" in str(checks["NVIDIA Apex"]["found"])
    assert "pip uninstall apex" in str(checks["NVIDIA Apex"]["path"])
    # The entry's own layers do not look at it: the same losses were measured with it.
    assert code == 0


def test_other_megatron_fails_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron.core.package_info.__version__", "0.20.1")
    checks = {check.name: check for check in check_machine(CPU)}
    assert not checks["Megatron"].ok and "0.20.1" in checks["Megatron"].found
    assert not checks["patches"].ok and "0.20.1 is installed" in checks["patches"].path
    assert not as_json(list(checks.values()))["starts"]


def test_missing_patch_target_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import megatron.training.training as training

    monkeypatch.delattr(training, "train_step")
    checks: dict[str, Check] = {check.name: check for check in check_machine(CPU)}
    assert not checks["patches"].ok
    assert "megatron.training.training:train_step does not exist" in checks["patches"].path


FACTS = {f"n{i}": {"torch": "2.13", "driver": "580"} for i in range(1, 5)}


def test_equal_nodes_have_no_outlier() -> None:
    assert nodes.outliers(FACTS, dict.fromkeys(FACTS, 100.0)) == {}


def test_other_version_and_wrong_clock_are_the_nodes_own() -> None:
    facts = FACTS | {"n3": {"torch": "2.12", "driver": "580"}}
    clocks = dict.fromkeys(FACTS, 100.0) | {"n2": 107.0}
    assert nodes.outliers(facts, clocks) == {
        "n3": ["torch is 2.12, 2.13 on other nodes"],
        "n2": ["its clock is +7.0 s off"],
    }


def test_bus_bandwidth_is_that_of_nccl_tests() -> None:
    assert nodes.bus_bandwidth(10**9, 0.01, 32) == pytest.approx(2 * 31 / 32 * 100)


@pytest.mark.parametrize(
    ("query", "values", "expected"),
    [
        ("memory.total", ["40960"] * 8, "GPU 0 has 40 GiB, 75 needed"),
        ("memory.total", ["81559"] * 7, "7 GPUs, 8 expected"),
        ("memory.used", ["0", "50000"], "GPU 1 holds 49 GiB of another process"),
        ("ecc.errors.uncorrected.volatile.total", ["0", "3"], "GPU 1 counts 3 uncorrected"),
    ],
)
def test_unfit_gpu_is_named(
    query: str, values: list[str], expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    healthy = {"memory.total": ["81559"] * 8, "memory.used": ["500"] * 8}
    answers = healthy | {"ecc.errors.uncorrected.volatile.total": ["[N/A]"] * 8} | {query: values}
    monkeypatch.setattr(nodes, "nvidia_smi", answers.__getitem__)
    monkeypatch.setattr(nodes, "_xid_problems", lambda: iter(()))
    problems = list(nodes.node_problems(tmp_path, 8, 0))
    assert len(problems) >= 1 and problems[0].startswith(expected)


def test_small_disk_is_named(tmp_path: Path) -> None:
    (problem,) = nodes.node_problems(tmp_path, 0, 10**9)
    assert "1e+09 needed for its checkpoints" in problem
