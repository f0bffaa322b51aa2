"""Every change to installed code: a table of rows, and the registry that applies them."""

from megatron_let.patches.registry import Patch, PatchError, PatchSet
from megatron_let.patches.table import PATCHES

__all__ = ["PATCHES", "Patch", "PatchError", "PatchSet"]
