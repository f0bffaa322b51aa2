"""The doctor reports what is installed, what a run does with it, and unfit nodes."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_let.compat.device import Host
from megatron_let.doctor import kernels, machine, node, nodes, packages
from megatron_let.doctor.check import Check
from megatron_let.doctor.machine import as_json, check_machine
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


def test_this_environment_would_start() -> None:
    code, checks = run_doctor()
    assert code == 0
    assert {"Python", "torch", "GPUs", "Megatron", "patches", "NVIDIA Apex"} <= checks.keys()
    assert "gloo" in str(checks["GPUs"]["path"])
    assert str(checks["patches"]["found"]).startswith("all ")


def test_wrong_apex_is_named_and_printing_package_keeps_json_valid(tmp_path: Path) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex/__init__.py").touch()
    write_package(tmp_path, "flash-attn", "2.8.3", "print('hello')")
    code, checks = run_doctor(str(tmp_path))
    assert "wrong apex" in str(checks["NVIDIA Apex"]["found"])
    assert "pip uninstall apex" in str(checks["NVIDIA Apex"]["path"])
    assert checks["flash-attn"]["found"] == "2.8.3"
    # This package's layers do not import apex: the same losses were measured with it.
    assert code == 0


def test_unsupported_megatron_version_fails(monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder whose modules are found first; they are unloaded afterwards."""
    before = dict(sys.modules)
    for name in list(sys.modules):
        if name.partition(".")[0] in ("apex", "deepspeed", "flash_attn"):
            del sys.modules[name]
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in sys.modules.keys() - before.keys():
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
    sys.modules.update(before)


def write_package(folder: Path, name: str, version: str, code: str = "") -> None:
    """Write a package and its metadata, as if it was installed."""
    module = folder / name.replace("-", "_")
    module.mkdir(parents=True)
    (module / "__init__.py").write_text(code)
    metadata = folder / f"{module.name}-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.mark.parametrize(("engine", "ok"), [(True, False), (False, True)])
def test_broken_flash_attention_fails_only_with_transformer_engine(
    engine: bool, ok: bool, installed: Path
) -> None:
    write_package(installed, "flash-attn", "2.8.3", "raise ImportError('undefined symbol: _ZN3')")
    check = packages.flash_attention(
        Host(cuda=engine, transformer_engine=engine, fused_gradients=False)
    )
    assert check.ok == ok and "undefined symbol: _ZN3" in check.path


def test_broken_part_of_apex_is_named(installed: Path) -> None:
    write_package(installed, "apex", "0.1")
    (installed / "apex/optimizers.py").touch()
    check = packages.apex(CPU)
    assert (check.ok, check.found) == (True, "FusedAdam")
    assert check.path.startswith("without fused gradient clipping")
    importlib.invalidate_caches()
    (installed / "amp_C.py").write_text("raise OSError('libcudart.so.11: cannot open')")
    check = packages.apex(CPU)
    assert not check.ok and "amp_C does not import (OSError: libcudart.so.11" in check.path


@pytest.mark.parametrize(
    ("version", "expected"),
    [("0.18.2", "not in >=0.19,<0.20"), ("0.19.8", "No module named 'deepspeed.ops'")],
)
def test_unusable_deepspeed_is_named(version: str, expected: str, installed: Path) -> None:
    write_package(installed, "deepspeed", version)
    check = packages.deepspeed()
    assert version in check.found and expected in check.path


def test_deepspeed_kernels_are_reported(installed: Path) -> None:
    write_package(installed, "deepspeed", "0.19.8")
    builders = installed / "deepspeed/ops/op_builder"
    builders.mkdir(parents=True)
    for folder in (builders, builders.parent):
        (folder / "__init__.py").touch()
    (builders / "all_ops.py").write_text(
        "class Builder:\n"
        "    def __init__(self, compatible): self.compatible = compatible\n"
        "    def is_compatible(self, verbose): return self.compatible\n"
        "ALL_OPS = {'fused_adam': Builder(False), 'cpu_adam': Builder(True)}\n"
    )
    info = "installed_ops = {'fused_adam': True, 'cpu_adam': False}\n"
    (installed / "deepspeed/git_version_info.py").write_text(info)
    assert packages.deepspeed().path == (
        "fused_adam is built; cpu_adam is compiled at first use; async_io cannot be built here"
    )


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The lock that a killed build of a kernel leaves."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    file = tmp_path / "cpu_adam/lock"
    file.parent.mkdir()
    file.touch()
    return file


def test_stale_lock_is_named_and_removed(lock: Path) -> None:
    before = time.time() - 2 * kernels.LONGEST_BUILD
    os.utime(lock, (before, before))
    (check,) = kernels.check_locks()
    # Not every run needs the kernel, so the node stays fit.
    assert check.ok and str(lock) in check.path and "doctor --build" in check.path
    reported: list[str] = []
    assert kernels.remove_stale_locks(reported.append) == {} and not lock.exists()
    assert len(reported) == 1 and reported[0].startswith("cpu_adam:")
    assert kernels.check_locks() == []


def test_recent_lock_is_named_and_kept(lock: Path) -> None:
    (check,) = kernels.check_locks()
    assert str(lock) in check.path and "another machine" in check.path
    # The kernel is not built, because the build would wait for the lock.
    assert kernels.remove_stale_locks(print).keys() == {"cpu_adam"} and lock.exists()


def test_lock_of_a_running_build_is_kept(lock: Path) -> None:
    before = time.time() - 2 * kernels.LONGEST_BUILD
    os.utime(lock, (before, before))
    with lock.open():
        assert kernels.check_locks() == []
        assert kernels.remove_stale_locks(print) == {} and lock.exists()


def test_default_extensions_folder_is_torchs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setattr("torch.utils.cpp_extension.get_default_build_root", lambda: str(tmp_path))
    (tmp_path / "py312_cu130/async_io").mkdir(parents=True)
    (tmp_path / "py312_cu130/async_io/lock").touch()
    (found,) = kernels.find_locks()
    assert (found.kernel, found.state) == ("async_io", "recent")


def test_gpu_that_torch_cannot_use_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "nvidia_smi", {"driver_version": ["470.57"] * 8}.__getitem__)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (check,) = (check for check in check_machine(CPU) if check.name == "GPUs")
    assert not check.ok and "8, driver 470.57, but torch cannot use them" in check.found


FACTS = {f"n{i}": {"torch": "2.13", "driver": "580"} for i in range(1, 5)}


def test_equal_nodes_have_no_outliers() -> None:
    assert nodes.outliers(FACTS, dict.fromkeys(FACTS, 100.0)) == {}


def test_different_version_and_wrong_clock_are_named() -> None:
    facts = FACTS | {"n3": {"torch": "2.12", "driver": "580"}}
    clocks = dict.fromkeys(FACTS, 100.0) | {"n2": 107.0}
    assert nodes.outliers(facts, clocks) == {
        "n3": ["torch is 2.12, 2.13 on other nodes"],
        "n2": ["its clock is +7.0 s off"],
    }


def test_bus_bandwidth_equals_nccl_tests() -> None:
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
    monkeypatch.setattr(node, "nvidia_smi", answers.__getitem__)
    monkeypatch.setattr(node, "_xid_problems", lambda: iter(()))
    problems = list(node.node_problems(tmp_path, 8, 0))
    assert len(problems) >= 1 and problems[0].startswith(expected)


def test_fatal_xid_of_the_kernel_log_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    log = "NVRM: Xid (PCI:0000:07:00): 79, pid=1, GPU has fallen off\nNVRM: Xid (PCI:1): 13, x\n"
    answer = subprocess.CompletedProcess([], 0, stdout=log)
    monkeypatch.setattr(node.subprocess, "run", lambda *_, **__: answer)
    assert list(node._xid_problems()) == ["the kernel logged Xid 79 since the last boot"]


def test_small_disk_is_named(tmp_path: Path) -> None:
    (problem,) = node.node_problems(tmp_path, 0, 10**9)
    assert "1e+09 needed for its checkpoints" in problem
