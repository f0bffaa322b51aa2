"""Apply rows of the patch table, and undo them.

A target must exist with the parameters and the version that its row expects, and must not be
replaced twice. Both are errors at start-up, so an upgrade of Megatron fails with the target's name.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import logging
from collections.abc import Callable, Mapping
from typing import Any, Self

from packaging.specifiers import SpecifierSet

from megatron_let.compat.patch_table import PATCHES, Patch, PatchError

logger = logging.getLogger(__name__)

_INHERITED = object()


class PatchSet:
    """Applied patches, in order."""

    def __init__(self) -> None:
        self._applied: list[tuple[Patch, Any, str, Any]] = []

    @property
    def applied(self) -> list[Patch]:
        """Return the rows applied so far."""
        return [patch for patch, *_ in self._applied]

    def apply(self, patch: Patch, make: Callable[[Any], Any]) -> None:
        """Apply one row.

        Args:
            make: returns the replacement, given the original attribute.

        Raises:
            PatchError: the target is missing, has other parameters, is of another version, or is
                replaced twice.
        """
        owner, attribute = _resolve(patch.target)
        original = getattr(owner, attribute)
        _check_version(patch)
        _check_parameters(patch, original)
        if any(
            p.target == patch.target and "replace" in (p.kind, patch.kind) for p in self.applied
        ):
            raise PatchError(f"{patch.target} is patched twice and one of the two replaces it.")
        # Read the owner's __dict__ to keep a static method's wrapper and to detect inheritance.
        raw = vars(owner).get(attribute, _INHERITED)
        setattr(owner, attribute, make(original))
        self._applied.append((patch, owner, attribute, raw))
        logger.debug("patched %s (%s): %s", patch.target, patch.kind, patch.reason)

    def apply_all(self, wrappers: Mapping[str, Callable[[Any], Any]]) -> Self:
        """Apply {patch target: function from the original to its replacement}, and return self.

        Raises:
            PatchError: a target has no row in the table, or does not fit its row. No patch
                is applied in that case.
        """
        try:
            for target, make in wrappers.items():
                if target not in PATCHES:
                    raise PatchError(f"{target} has no row in the patch table; add one.")
                self.apply(PATCHES[target], make)
        except PatchError:
            self.undo()
            raise
        return self

    def describe(self) -> str:
        """Return one line for the log."""
        names = ", ".join(patch.target.rpartition(":")[2] for patch in self.applied)
        return f"patched {len(self.applied)} targets ({names})"

    def undo(self) -> None:
        """Restore every original, in reverse order."""
        while self._applied:
            _, owner, attribute, raw = self._applied.pop()
            if raw is _INHERITED:
                delattr(owner, attribute)
            else:
                setattr(owner, attribute, raw)


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
        # A user's checkout shadows pip's package, whose metadata would give pip's version.
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
