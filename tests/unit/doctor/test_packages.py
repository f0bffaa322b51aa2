"""Checks of installed packages, and the command on this environment."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_let.compat.device import Host
from megatron_let.doctor import packages
from tests.helpers.runs import ROOT, environment

pytestmark = pytest.mark.medium

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


def write_package(folder: Path, name: str, version: str, code: str = "") -> None:
    """Write a package and its metadata, as if it was installed."""
    module = folder / name.replace("-", "_")
    module.mkdir(parents=True)
    (module / "__init__.py").write_text(code)
    metadata = folder / f"{module.name}-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_this_environment_would_start() -> None:
    code, checks = run_doctor()
    assert code == 0
    assert {"Python", "torch", "GPUs", "Megatron", "patches", "NVIDIA Apex"} <= checks.keys()
    assert "gloo" in str(checks["GPUs"]["path"])
    assert str(checks["patches"]["found"]).startswith("all ")


def test_wrong_apex_is_reported_and_printing_package_keeps_json_valid(tmp_path: Path) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex/__init__.py").touch()
    write_package(tmp_path, "flash-attn", "2.8.3", "print('hello')")
    code, checks = run_doctor(str(tmp_path))
    assert "wrong apex" in str(checks["NVIDIA Apex"]["found"])
    assert "pip uninstall apex" in str(checks["NVIDIA Apex"]["path"])
    assert checks["flash-attn"]["found"] == "2.8.3"
    # This package's layers do not import apex: the same losses were measured with it.
    assert code == 0


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


@pytest.mark.parametrize(("engine", "ok"), [(True, False), (False, True)])
def test_broken_flash_attention_fails_only_with_transformer_engine(
    engine: bool, ok: bool, installed: Path
) -> None:
    write_package(installed, "flash-attn", "2.8.3", "raise ImportError('undefined symbol: _ZN3')")
    check = packages.flash_attention(
        Host(cuda=engine, transformer_engine=engine, fused_gradients=False)
    )
    assert check.ok == ok and "undefined symbol: _ZN3" in check.path


def test_broken_part_of_apex_is_reported(installed: Path) -> None:
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
def test_unusable_deepspeed_is_reported(version: str, expected: str, installed: Path) -> None:
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
