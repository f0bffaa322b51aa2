"""setup.py and constraints.txt say the same as the code that they are for."""

from __future__ import annotations

import ast
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import megatron_let
from megatron_let.compat.patch_table import MEGATRON_VERSIONS, TORCH_VERSIONS

ROOT = Path(__file__).resolve().parents[3]
# Imported under another name than the package's; triton comes with torch, which pins it.
PACKAGES = {
    "megatron": "megatron-core",
    "modelopt": "nvidia-modelopt",
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
    """Collects the top-level names of what a module cannot do without."""

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
    # A program in tools/ imports its neighbours by their bare names.
    neighbours = {path.stem for path in folder.rglob("*.py")} if folder.name == "tools" else set()
    ours = {"megatron_let", "tests", "tools"} | neighbours
    return {PACKAGES.get(name, name) for name in imports.names - sys.stdlib_module_names - ours}


def test_version_is_the_packages(metadata: dict[str, Any]) -> None:
    assert metadata["version"] == megatron_let.__version__


@pytest.mark.parametrize("folder", ["megatron_let", "tools"])
def test_every_import_is_declared(folder: str, requirements: dict[str, Requirement]) -> None:
    imports = {canonicalize_name(name) for name in imported_packages(ROOT / folder)}
    assert imports <= requirements.keys()


def test_every_requirement_has_a_tested_version_in_its_range(
    requirements: dict[str, Requirement], tested: dict[str, str]
) -> None:
    for name, requirement in requirements.items():
        assert name in tested, f"constraints.txt has no exact version of {name}"
        assert requirement.specifier.contains(tested[name]), f"{requirement}, {tested[name]}"


@pytest.mark.parametrize(
    ("name", "patched"), [("megatron-core", MEGATRON_VERSIONS), ("torch", TORCH_VERSIONS)]
)
def test_admitted_versions_are_in_the_patch_tables_range(
    name: str, patched: str, requirements: dict[str, Requirement], tested: dict[str, str]
) -> None:
    oldest = [bound.version for bound in requirements[name].specifier if bound.operator == ">="]
    for version in [*oldest, tested[name]]:
        assert SpecifierSet(patched).contains(version)
