"""The package's layout: which package may import which, and the README's map of the tree."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.helpers.runs import ROOT

PACKAGE = ROOT / "megatron_let"
# A package imports only from lower layers; packages of one layer do not import each other.
LAYERS = (
    {"errors"},
    {"files"},
    {"losses"},
    {"config"},
    {"teacher", "compat", "late_to_early"},
    {"data", "placement", "run"},
    {"metrics", "engines", "planner", "preprocessing"},
    {"checkpoint"},
    {"methods", "evaluation", "doctor", "theory"},
    {"integration", "timeseries"},
    {"pretrain"},
    {"cli"},
)
LAYER_OF = {package: number for number, packages in enumerate(LAYERS) for package in packages}
MODULES = sorted(PACKAGE.rglob("*.py"))


def dotted_name(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


def imported_modules(path: Path) -> Iterator[str]:
    """Yield the modules of this package that a file imports, at its top or inside functions."""
    names = {dotted_name(module) for module in MODULES}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in names)
        elif isinstance(node, ast.ImportFrom) and node.module in names:
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            yield from (members & names) or {node.module}


def package_of(module: str) -> str:
    return [*module.split("."), ""][1]


@pytest.mark.parametrize("path", MODULES, ids=dotted_name)
def test_module_imports_only_lower_layers(path: Path) -> None:
    package = package_of(dotted_name(path))
    for module in imported_modules(path):
        other = package_of(module)
        if package and other not in ("", package):
            assert LAYER_OF[other] < LAYER_OF[package], f"{package} imports {module}"


def test_modules_have_no_import_cycle() -> None:
    graph = {
        dotted_name(path): set(imported_modules(path)) - {dotted_name(path)} for path in MODULES
    }
    TopologicalSorter(graph).prepare()


def test_layers_list_every_package() -> None:
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    loose = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert loose == {"errors", "integration", "late_to_early", "pretrain"}
    assert packages | loose == set(LAYER_OF)


def test_module_names_are_unique() -> None:
    """Except those in cli/, which are named after their commands."""
    packages = [p for p in MODULES if p.parent.name != "cli"]
    names = [p.stem for p in packages if p.stem not in ("__init__", "__main__")]
    allowed = {"checkpoint", "config", "validation", "model"}
    repeated = {name for name in names if names.count(name) > 1} - allowed
    assert not repeated


def summary(path: Path) -> str:
    """Return the first sentence of a module's docstring, without its period."""
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    return docstring.split("\n\n")[0].replace("\n", " ").removesuffix(".")


def test_readme_map_is_the_tree() -> None:
    """Each row is a package or a loose module, with the first sentence of its docstring."""
    readme = (ROOT / "README.md").read_text()
    rows = dict(re.findall(r"^\| `megatron_let/([\w/.]+)` \| (.+) \|$", readme, re.MULTILINE))
    expected = {
        path.relative_to(PACKAGE).as_posix(): summary(path)
        for path in PACKAGE.glob("*.py")
        if path.stem != "__init__"
    }
    for path in PACKAGE.glob("*/__init__.py"):
        expected[f"{path.parent.name}/"] = summary(path)
    assert rows == expected


def test_tests_mirror_the_package() -> None:
    """A folder of unit tests is named after the package that it tests."""
    folders = {path.parent.name for path in (ROOT / "tests" / "unit").glob("*/__init__.py")}
    assert folders - {"launch", "benchmark"} <= set(LAYER_OF)
