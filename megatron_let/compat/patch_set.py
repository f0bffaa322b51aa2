"""Apply rows of the patch table, and take them back.

A patch names an attribute of an installed module, says why it must differ, and is applied
explicitly. The target must exist with the parameters that the row expects, and no target may be
replaced twice; both are errors at start-up, so that an upgrade of Megatron fails by name.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from packaging.specifiers import SpecifierSet

logger = logging.getLogger(__name__)


_INHERITED = object()


class PatchError(RuntimeError):
    """A patch does not fit what is installed, or clashes with another patch."""


@dataclass(frozen=True)
class Patch:
    """One row of the patch table.

    Attributes:
        target: `module:attribute`, e.g. `megatron.training.training:train_step`; the attribute
            may be dotted (`torch:Tensor.cuda`).
        kind: `wrap` calls the original, `replace` does not.
        reason: why Megatron as installed does not do.
        package: distribution whose version is checked against `versions`.
        versions: PEP 440 range in which the target was seen to behave as the row assumes.
        parameters: leading parameter names that the target must have; None for C functions.
        unnecessary_when: what would make the row superfluous.
        test: the test that fails without it, as `file::test`.
    """

    target: str
    kind: Literal["wrap", "replace"]
    reason: str
    package: str
    versions: str
    parameters: tuple[str, ...] | None
    unnecessary_when: str
    test: str


def _resolve(target: str) -> tuple[Any, str]:
    """Return (owner object, attribute name) of `module:dotted.attribute`."""
    module_name, _, path = target.partition(":")
    *parents, attribute = path.split(".")
    try:
        owner: Any = importlib.import_module(module_name)
        for parent in parents:
            owner = getattr(owner, parent)
        getattr(owner, attribute)
    except (ImportError, AttributeError) as error:
        raise PatchError(
            f"Patch target {target} does not exist in what is installed ({error}); "
            "install the versions in constraints.txt."
        ) from error
    return owner, attribute


def _installed_version(package: str) -> str:
    if package == "megatron-core":
        # A user's checkout shadows pip's package, and pip's metadata would speak of the latter.
        return str(importlib.import_module("megatron.core.package_info").__version__)
    return importlib.metadata.version(package)


def _check_version(patch: Patch) -> None:
    installed = _installed_version(patch.package)
    if not SpecifierSet(patch.versions, prereleases=True).contains(installed.split("+")[0]):
        raise PatchError(
            f"Patch of {patch.target} was made for {patch.package}{patch.versions} but "
            f"{installed} is installed; install the versions in constraints.txt."
        )


def _check_parameters(patch: Patch, original: Callable[..., Any]) -> None:
    if patch.parameters is None:
        return
    found = tuple(inspect.signature(original).parameters)[: len(patch.parameters)]
    if found != patch.parameters:
        raise PatchError(
            f"Patch target {patch.target} has parameters {found} where {patch.parameters} "
            "were expected; install the versions in constraints.txt."
        )


class PatchSet:
    """The patches that one process has applied, in order; `undo` takes them back in reverse."""

    def __init__(self) -> None:
        self._applied: list[tuple[Patch, Any, str, Any]] = []

    @property
    def applied(self) -> list[Patch]:
        """Rows applied so far."""
        return [patch for patch, *_ in self._applied]

    def apply(self, patch: Patch, make: Callable[[Any], Any]) -> None:
        """Apply one row.

        Args:
            patch: the row.
            make: takes the original attribute, returns what stands in its place.

        Raises:
            PatchError: the target is missing, has other parameters, belongs to another version,
                or was replaced before.
        """
        owner, attribute = _resolve(patch.target)
        original = getattr(owner, attribute)
        _check_version(patch)
        _check_parameters(patch, original)
        if any(
            p.target == patch.target and "replace" in (p.kind, patch.kind) for p in self.applied
        ):
            raise PatchError(f"{patch.target} is patched twice and one of the two replaces it.")
        # As it stands in the owner itself: static methods keep their wrapper, inherited ones go.
        raw = vars(owner).get(attribute, _INHERITED)
        setattr(owner, attribute, make(original))
        self._applied.append((patch, owner, attribute, raw))
        logger.debug("patched %s (%s): %s", patch.target, patch.kind, patch.reason)

    def apply_all(
        self, rows: Mapping[str, Patch], makers: Mapping[str, Callable[[Any], Any]]
    ) -> None:
        """Apply `makers`, a map from target to `make`, by their rows in the table.

        Raises:
            PatchError: a target has no row.
        """
        for target, make in makers.items():
            if target not in rows:
                raise PatchError(f"{target} has no row in the patch table; add one.")
            self.apply(rows[target], make)

    def describe(self) -> str:
        """One line for the log."""
        names = ", ".join(patch.target.rpartition(":")[2] for patch in self.applied)
        return f"patched {len(self.applied)} targets ({names})"

    def undo(self) -> None:
        """Restore every original."""
        while self._applied:
            _, owner, attribute, raw = self._applied.pop()
            if raw is _INHERITED:
                delattr(owner, attribute)
            else:
                setattr(owner, attribute, raw)
