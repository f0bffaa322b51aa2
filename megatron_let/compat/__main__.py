"""`python -m megatron_let.compat`: print the patch tables."""

from rich.console import Console
from rich.table import Table

from megatron_let.compat.patch_table import OBJECT_PATCHES, PATCHES

if __name__ == "__main__":
    modules = Table(
        "target", "kind", "versions", "reason", "unnecessary when", title="Modules and classes"
    )
    for row in PATCHES.values():
        versions = f"{row.package}{row.versions}"
        modules.add_row(row.target, row.kind, versions, row.reason, row.unnecessary_when)
    objects = Table("target", "where", "reason", "removed when", title="Objects of a run")
    for patch in OBJECT_PATCHES:
        objects.add_row(patch.target, patch.where, patch.reason, patch.removed_when)
    Console().print(modules, objects)
