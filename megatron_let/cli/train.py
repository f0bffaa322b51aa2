"""Run one pretraining: `--config RECIPE`, and flags of Megatron and LET that override the recipe.

    megatron-let train --config let_1p4b ...                   # one process
    torchrun --nproc-per-node 8 -m megatron_let.cli train --config let_1p4b ...

This command trains in its own process and starts no others; torchrun starts one process per GPU.
"""

from __future__ import annotations

import os


def main(argv: list[str] | None = None) -> int:
    """Train as the rank that torchrun set, else as a single process; return the exit code."""
    from megatron_let import pretrain

    if argv and {"-h", "--help"} & set(argv):
        print(__doc__)
    # torchrun sets both. Port 0 selects a free one, which suffices for a single process.
    os.environ.setdefault("MASTER_ADDR", "localhost")
    os.environ.setdefault("MASTER_PORT", "0")
    return pretrain.main(argv)
