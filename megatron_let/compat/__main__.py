"""`python -m megatron_let.compat`: print the patch table."""

from rich.console import Console
from rich.table import Table

from megatron_let.compat.patch_table import PATCHES

if __name__ == "__main__":
    table = Table("target", "kind", "versions", "reason", "unnecessary when")
    for row in PATCHES.values():
        versions = f"{row.package}{row.versions}"
        table.add_row(row.target, row.kind, versions, row.reason, row.unnecessary_when)
    Console().print(table)
