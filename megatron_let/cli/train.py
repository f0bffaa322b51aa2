"""Run one pretraining: `--config RECIPE`, and flags of Megatron and LET that override the recipe.

    megatron-let train --config let_1p4b ...                   # one process
    torchrun --nproc-per-node 8 -m megatron_let.cli train --config let_1p4b ...

This command trains in its own process and starts no others; torchrun starts one process per GPU.
"""

import argparse
import os

from megatron_let.config.arguments import add_arguments


def main(argv: list[str] | None = None) -> int:
    """Train as the rank that torchrun set, else as a single process; return the exit code."""
    if argv and {"-h", "--help"} & set(argv):
        _parser().print_help()
        return 0
    from megatron_let import pretrain

    # torchrun sets both. Port 0 selects a free one, which suffices for a single process.
    os.environ.setdefault("MASTER_ADDR", "localhost")
    os.environ.setdefault("MASTER_PORT", "0")
    return pretrain.main(argv)


def _parser() -> argparse.ArgumentParser:
    """Return a parser of LET's flags alone, for --help: Megatron's take seconds to import."""
    parser = argparse.ArgumentParser(
        prog="megatron-let train",
        usage="%(prog)s --config RECIPE [any flag]",
        description=__doc__,
        epilog="Megatron's flags, about 500: python -m megatron_let.pretrain --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="RECIPE", help="recipe: a file or a packaged name")
    return add_arguments(parser)
