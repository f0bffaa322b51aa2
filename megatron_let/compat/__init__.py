"""Patches of installed code: the table of rows and what applies them; CPU shims; torch layers."""

from megatron_let.compat.patch_set import PatchSet
from megatron_let.compat.patch_table import PATCHES, Patch, PatchError

__all__ = ["PATCHES", "Patch", "PatchError", "PatchSet"]
