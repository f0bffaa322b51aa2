"""The metadata agrees with the code, and an installed wheel has the recipes and the command."""

from __future__ import annotations

import ast
import json
import os
import runpy
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import megatron_let
from megatron_let.cli.__main__ import COMMANDS
from megatron_let.compat.patch_table import MEGATRON_VERSIONS, TORCH_VERSIONS

pytestmark = pytest.mark.medium

ROOT = Path(__file__).resolve().parents[3]
# Import name -> distribution, where they differ; torch pins triton.
PACKAGES = {
    "backports": "backports.zstd",
    # In Python 3.14 and later.
    "compression": "backports.zstd",
    "megatron": "megatron-core",
    "modelopt": "nvidia-modelopt",
    "nvidia_resiliency_ext": "nvidia-resiliency-ext",
    "triton": "torch",
    "yaml": "pyyaml",
}


@pytest.fixture(scope="module")
def metadata() -> dict[str, Any]:
    captured: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", captured.update)
        patch.chdir(ROOT)
        runpy.run_path("setup.py")
    return captured


@pytest.fixture(scope="module")
def requirements(metadata: dict[str, Any]) -> dict[str, Requirement]:
    extras = metadata["extras_require"].values()
    lines = [*metadata["install_requires"], *(line for extra in extras for line in extra)]
    return {canonicalize_name(parsed.name): parsed for parsed in map(Requirement, lines)}


@pytest.fixture(scope="module")
def tested() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pins}


class Imports(ast.NodeVisitor):
    """Collects the top-level names of a module's imports, except optional ones."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def visit_Import(self, node: ast.Import) -> None:
        self.names.update(alias.name.partition(".")[0] for alias in node.names)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.module and node.level == 0:
            self.names.add(node.module.partition(".")[0])

    def visit_Try(self, node: ast.Try) -> None:
        caught = {ast.unparse(handler.type) for handler in node.handlers if handler.type}
        optional = bool(caught & {"ImportError", "ModuleNotFoundError"})
        for statement in [*([] if optional else node.body), *node.handlers, *node.orelse]:
            self.visit(statement)


def imported_packages(folder: Path) -> set[str]:
    imports = Imports()
    for path in folder.rglob("*.py"):
        imports.visit(ast.parse(path.read_text(encoding="utf-8")))
    # Scripts in tools/ import each other by their bare names.
    neighbours = {path.stem for path in folder.rglob("*.py")} if folder.name == "tools" else set()
    ours = {"megatron_let", "tests", "tools"} | neighbours
    return {PACKAGES.get(name, name) for name in imports.names - sys.stdlib_module_names - ours}


def test_metadata_has_the_packages_version(metadata: dict[str, Any]) -> None:
    assert metadata["version"] == megatron_let.__version__


@pytest.mark.parametrize("folder", ["megatron_let", "tools"])
def test_every_import_is_a_requirement(folder: str, requirements: dict[str, Requirement]) -> None:
    imports = {canonicalize_name(name) for name in imported_packages(ROOT / folder)}
    assert imports <= requirements.keys()


def test_constraints_pin_every_requirement_within_its_range(
    requirements: dict[str, Requirement], tested: dict[str, str]
) -> None:
    for name, requirement in requirements.items():
        assert name in tested, f"constraints.txt has no exact version of {name}"
        assert requirement.specifier.contains(tested[name]), f"{requirement}, {tested[name]}"


@pytest.mark.parametrize(
    ("name", "patched"), [("megatron-core", MEGATRON_VERSIONS), ("torch", TORCH_VERSIONS)]
)
def test_allowed_versions_are_in_the_patch_tables_range(
    name: str, patched: str, requirements: dict[str, Requirement], tested: dict[str, str]
) -> None:
    oldest = [bound.version for bound in requirements[name].specifier if bound.operator == ">="]
    for version in [*oldest, tested[name]]:
        assert SpecifierSet(patched).contains(version)


# The installed wheel


@dataclass(frozen=True)
class Installed:
    """The wheel, installed without its dependencies and found before the checkout."""

    folder: Path

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *command],
            cwd=self.folder,
            env=os.environ | {"PYTHONPATH": str(self.folder)},
            capture_output=True,
            text=True,
            timeout=120,
        )

    def megatron_let(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.run(str(self.folder / "bin" / "megatron-let"), *arguments)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    for name in ("megatron_let", "configs", "tests", "tools"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    flags = ("--no-deps", "--no-build-isolation", "--no-index", "--no-compile", "--target")
    command = [sys.executable, "-m", "pip", "install", "--quiet", *flags, str(target), str(source)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return Installed(target)


def files_of(folder: Path, *suffixes: str) -> set[str]:
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.suffix in suffixes)
    return {str(path) for path in paths}


def test_wheel_has_the_package_the_recipes_and_no_tests(installed: Installed) -> None:
    names = {path.name for path in installed.folder.iterdir()}
    version = megatron_let.__version__
    assert names == {"bin", "megatron_let", f"megatron_let-{version}.dist-info"}
    package = installed.folder / "megatron_let"
    assert files_of(package, ".py") == files_of(ROOT / "megatron_let", ".py")
    recipes = files_of(ROOT / "configs", ".yaml", ".json")
    assert len(recipes) > 15
    assert files_of(package / "recipes", ".yaml", ".json") == recipes


def test_help_lists_every_command(installed: Installed) -> None:
    result = installed.megatron_let("--help")
    assert result.returncode == 0
    assert all(f"  {name} " in result.stdout for name in COMMANDS)
    assert "torchrun" in result.stdout


@pytest.mark.parametrize("arguments", [["trian"], []], ids=["unknown", "none"])
def test_unknown_command_returns_2(installed: Installed, arguments: list[str]) -> None:
    result = installed.megatron_let(*arguments)
    assert result.returncode == 2
    assert "train" in result.stdout + result.stderr


def test_help_of_a_command_imports_no_torch(installed: Installed) -> None:
    """Except `train`, whose flags are Megatron's, and `doctor`."""
    code = """
import sys
from megatron_let.cli.__main__ import COMMANDS, main
for name in COMMANDS.keys() - {"train", "doctor"}:
    try:
        main([name, "--help"])
    except SystemExit as end:
        assert end.code == 0, name
    assert not {"torch", "transformers", "megatron.core"} & sys.modules.keys(), name
"""
    result = installed.run("-c", code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("usage: ") == len(COMMANDS) - 2


def test_config_takes_the_name_of_a_packaged_recipe(installed: Installed) -> None:
    flags = ("--gpus", "1", "--gpu", "a100-80g", "--json")
    result = installed.megatron_let("plan", "--config", "let_7b_deepspeed_1gpu", *flags)
    assert result.returncode == 0, result.stderr
    # The recipe's DeepSpeed config is packaged with it.
    assert json.loads(result.stdout)["zero"]["offload_optimizer"]
    code = "from megatron_let.config.recipes import *; load_recipe(Path('let_8b'))"
    result = installed.run("-c", code)
    assert "let_8b" in result.stderr and "let_7b, let_7b_deepspeed" in result.stderr
