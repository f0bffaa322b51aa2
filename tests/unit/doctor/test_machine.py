"""Checks of the whole machine."""

from __future__ import annotations

import pytest

from megatron_let.compat.device import Host
from megatron_let.doctor import machine
from megatron_let.doctor.check import Check
from megatron_let.doctor.machine import as_json, check_machine

CPU = Host(cuda=False, transformer_engine=False, fused_gradients=False)


def test_unsupported_megatron_version_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron.core.package_info.__version__", "0.20.1")
    checks = {check.name: check for check in check_machine(CPU)}
    assert not checks["Megatron"].ok and "0.20.1" in checks["Megatron"].found
    assert not checks["patches"].ok and "0.20.1 is installed" in checks["patches"].path
    assert not as_json(list(checks.values()))["starts"]


def test_missing_patch_target_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    import megatron.training.training as training

    monkeypatch.delattr(training, "train_step")
    checks: dict[str, Check] = {check.name: check for check in check_machine(CPU)}
    assert not checks["patches"].ok
    assert "megatron.training.training:train_step does not exist" in checks["patches"].path


def test_gpu_that_torch_cannot_use_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "driver_versions", lambda: ["470.57"] * 8)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (check,) = (check for check in check_machine(CPU) if check.name == "GPUs")
    assert not check.ok and "8, driver 470.57, but torch cannot use them" in check.found
