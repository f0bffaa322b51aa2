"""PatchSet applies rows or fails with the target's name; the table matches what is installed."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import megatron.core.datasets.utils
import pytest
import torch

from megatron_let.compat import PATCHES, Patch, PatchError, PatchSet, apply
from megatron_let.compat import patch_table as table
from megatron_let.compat.cpu_shims import cpu_shims
from megatron_let.compat.device import Host
from tests.helpers.runs import ROOT

GPU = Host(cuda=True, transformer_engine=True, fused_gradients=True)


def row(target: str = "patched_module:function", **values: Any) -> Patch:
    common: dict[str, Any] = {
        "kind": "wrap",
        "reason": "test",
        "package": "torch",
        "versions": ">=2",
        "parameters": None,
        "unnecessary_when": "never",
        "test": "here",
    }
    return Patch(target=target, **common | values)


def identity(original: Any) -> Any:
    return original


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """An installed module with a function, a class and a subclass."""

    def function(first: int, second: int = 2) -> int:
        return first + second

    class Base:
        def inherited(self) -> str:
            return "original"

        def method(self) -> str:
            return "original"

        @staticmethod
        def static() -> str:
            return "original"

        @classmethod
        def of_class(cls) -> str:
            return "original"

    class Class(Base):
        method, static, of_class = Base.method, Base.__dict__["static"], Base.__dict__["of_class"]

    module = ModuleType("patched_module")
    module.function, module.Class = function, Class  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "patched_module", module)
    return module


# PatchSet


def test_wrapper_gets_original_and_replaces_it(module: ModuleType) -> None:
    patches = PatchSet()
    patches.apply(row(), lambda original: lambda *args: 10 * original(*args))
    assert module.function(1) == 30
    assert [patch.target for patch in patches.applied] == ["patched_module:function"]
    assert patches.describe() == "patched 1 targets (function)"


@pytest.mark.parametrize(
    "target",
    [
        "no_such_module:function",
        "patched_module:no_such_function",
        "patched_module:Class.no_such_method",
        "patched_module:NoSuchClass.method",
        "patched_module:",
    ],
)
def test_missing_target_raises_with_its_name(module: ModuleType, target: str) -> None:
    before = dict(vars(module))
    with pytest.raises(PatchError, match=f"Patch target {target} does not exist"):
        PatchSet().apply(row(target), identity)
    assert dict(vars(module)) == before, "no attribute was made"


@pytest.mark.parametrize("parameters", [("other",), ("first", "third"), ("first", "second", "x")])
def test_other_parameters_raise_with_both_signatures(
    module: ModuleType, parameters: tuple[str, ...]
) -> None:
    original = module.function
    with pytest.raises(PatchError, match=r"has parameters .*'first'.* where .* were expected"):
        PatchSet().apply(row(parameters=parameters), identity)
    assert module.function is original


@pytest.mark.parametrize("parameters", [(), ("first",), ("first", "second")])
def test_leading_parameters_are_sufficient(module: ModuleType, parameters: tuple[str, ...]) -> None:
    PatchSet().apply(row(parameters=parameters), identity)


@pytest.mark.parametrize("versions", ["<2", ">=99", "==2.0.0"])
def test_other_version_raises_with_both_versions(module: ModuleType, versions: str) -> None:
    original = module.function
    expected = rf"made for torch{versions} but {torch.__version__.split('+')[0]}.* is installed"
    with pytest.raises(PatchError, match=expected):
        PatchSet().apply(row(versions=versions), identity)
    assert module.function is original


def test_version_is_of_the_imported_megatron(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron.core.package_info.__version__", "0.20.1")
    with pytest.raises(PatchError, match=r"0\.20\.1 is installed"):
        PatchSet().apply(row(package="megatron-core", versions="<0.20"), identity)


@pytest.mark.parametrize(
    ("first", "second"), [("replace", "replace"), ("wrap", "replace"), ("replace", "wrap")]
)
def test_second_patch_of_replaced_target_raises(
    module: ModuleType, first: str, second: str
) -> None:
    patches = PatchSet()
    patches.apply(row(kind=first), identity)
    with pytest.raises(PatchError, match="patched_module:function is patched twice"):
        patches.apply(row(kind=second), identity)


def test_two_wrappers_nest_and_undo_removes_both(module: ModuleType) -> None:
    original, patches = module.function, PatchSet()
    patches.apply(row(), lambda inner: lambda *args: inner(*args) + 1)
    patches.apply(row(), lambda inner: lambda *args: inner(*args) * 10)
    assert module.function(1) == 40
    patches.undo()
    assert module.function is original and patches.applied == []


@pytest.mark.parametrize("name", ["method", "inherited", "static", "of_class"])
def test_undo_restores_class_attributes(module: ModuleType, name: str) -> None:
    before = dict(vars(module.Class))
    patches = PatchSet()
    patches.apply(row(f"patched_module:Class.{name}"), lambda original: lambda *args: "patched")
    assert getattr(module.Class(), name)() == "patched"
    patches.undo()
    assert getattr(module.Class(), name)() == "original"
    assert dict(vars(module.Class)) == before


def test_undo_restores_originals_of_cpu_shims() -> None:
    before = {target: attribute(target) for target in cpu_shims()}
    patches = PatchSet().apply_all(cpu_shims())
    changed = [target for target in before if attribute(target) is not before[target]]
    patches.undo()
    assert changed == list(before)
    assert [target for target in before if attribute(target) is not before[target]] == []


def attribute(target: str) -> Any:
    module_name, _, path = target.partition(":")
    found: Any = importlib.import_module(module_name)
    for name in path.split("."):
        found = getattr(found, name)
    return found


def test_apply_all_of_a_target_that_does_not_fit_applies_none(module: ModuleType) -> None:
    before = attribute("torch:Tensor.cuda")
    with pytest.raises(PatchError, match="torch:nothing"):
        PatchSet().apply_all(
            {"torch:Tensor.cuda": lambda original: None, "torch:nothing": identity}
        )
    assert attribute("torch:Tensor.cuda") is before


def test_apply_all_of_a_target_without_row_raises() -> None:
    with pytest.raises(PatchError, match="torch:nothing has no row in the patch table"):
        PatchSet().apply_all({"torch:nothing": identity})


# The table


@pytest.fixture
def all_rows_applied() -> Iterator[PatchSet]:
    import megatron.training.training  # noqa: F401

    patches = PatchSet().apply_all(dict.fromkeys(PATCHES, identity))
    yield patches
    patches.undo()


def test_every_row_fits_what_is_installed(all_rows_applied: PatchSet) -> None:
    assert [patch.target for patch in all_rows_applied.applied] == list(PATCHES)


def test_no_target_has_two_rows() -> None:
    assert len(PATCHES) == len(table.ROWS)


@pytest.mark.parametrize("patch", PATCHES.values(), ids=lambda patch: patch.target)
def test_every_row_has_reason_end_and_versions(patch: Patch) -> None:
    assert len(patch.reason) > 10 and len(patch.unnecessary_when) > 10
    assert patch.package in ("torch", "megatron-core") and patch.versions.startswith(">=")
    assert patch.package == "megatron-core" or patch.target.startswith("torch")


@pytest.mark.parametrize(
    "name", sorted({patch.test for patch in (*PATCHES.values(), *table.OBJECT_PATCHES)})
)
def test_every_row_names_an_existing_test(name: str) -> None:
    file, _, function = name.partition("::")
    assert (ROOT / file).is_file(), f"no file {file}"
    definitions = ast.walk(ast.parse((ROOT / file).read_text()))
    names = {node.name for node in definitions if isinstance(node, ast.FunctionDef)}
    assert function in names, f"no {function} in {file}"


@pytest.mark.parametrize("patch", table.OBJECT_PATCHES, ids=lambda patch: patch.target)
def test_every_object_patch_names_an_existing_symbol(patch: table.ObjectPatch) -> None:
    assert callable(attribute(patch.where))
    assert len(patch.reason) > 10 and len(patch.removed_when) > 10


def strings_of(file: Path) -> set[str]:
    """Return the string constants of a file, and sums of a named constant and a literal."""
    nodes = list(ast.walk(ast.parse(file.read_text())))
    named = {
        target.id: node.value.value
        for node in nodes
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    constants = {str(node.value) for node in nodes if isinstance(node, ast.Constant)}
    sums = {
        str(named.get(node.left.id)) + str(node.right.value)
        for node in nodes
        if isinstance(node, ast.BinOp)
        and isinstance(node.left, ast.Name)
        and isinstance(node.right, ast.Constant)
    }
    return constants | sums


def test_every_row_is_applied_by_the_package() -> None:
    files = set((ROOT / "megatron_let").rglob("*.py")) - {Path(table.__file__)}
    used = set().union(*(strings_of(file) for file in files))
    assert set(PATCHES) - used == set(), "rows that nothing applies"


def test_cpu_shims_and_their_rows_match() -> None:
    tested = "tests/distributed/test_cpu_host.py::test_every_shim_is_needed_or_documented"
    assert cpu_shims().keys() == {row.target for row in PATCHES.values() if row.test == tested}


# Patches that a host needs


@pytest.fixture
def undo() -> Iterator[Callable[[PatchSet], PatchSet]]:
    applied: list[PatchSet] = []

    def later(patches: PatchSet) -> PatchSet:
        applied.append(patches)
        return patches

    yield later
    for patches in applied:
        patches.undo()


def test_compile_helpers_is_replaced_without_a_makefile(
    undo: Callable[[PatchSet], PatchSet], capfd: pytest.CaptureFixture[str]
) -> None:
    # The makefile is missing, or make itself.
    with pytest.raises((SystemExit, FileNotFoundError)):
        megatron.core.datasets.utils.compile_helpers()
    capfd.readouterr()
    patches = undo(apply.apply_host_patches(GPU))
    targets = [patch.target for patch in patches.applied]
    assert "megatron.core.datasets.utils:compile_helpers" in targets
    megatron.core.datasets.utils.compile_helpers()
    assert capfd.readouterr() == ("", "")


def test_compile_helpers_is_kept_with_a_makefile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undo: Callable[[PatchSet], PatchSet]
) -> None:
    (tmp_path / "Makefile").touch()
    monkeypatch.setattr(apply, "files", lambda package: tmp_path)
    patches = undo(apply.apply_host_patches(GPU))
    targets = [patch.target for patch in patches.applied]
    assert "megatron.core.datasets.utils:compile_helpers" not in targets
