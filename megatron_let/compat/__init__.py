"""Every change to installed code: a table of rows, and the registry that applies them."""

from megatron_let.compat.patch_set import Patch, PatchError, PatchSet
from megatron_let.compat.patch_table import PATCHES

__all__ = ["PATCHES", "Patch", "PatchError", "PatchSet"]
