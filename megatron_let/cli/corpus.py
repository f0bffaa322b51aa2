"""Collect real text for experiments without a hub: JSON lines like the Pile's, and a manifest.

The source `environment` is the code and documentation of this Python environment. The others are
Debian documentation packages, which apt downloads and does not install.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_let.cli.common import run_command
from megatron_let.data.corpus import ENVIRONMENT, SOURCES, make_corpus


def main(argv: list[str] | None = None) -> int:
    """Make the corpus; return the exit code."""
    parser = argparse.ArgumentParser(description=" ".join((__doc__ or "").split()))
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder of the corpus")
    add(
        "--sources",
        nargs="+",
        choices=SOURCES,
        default=[ENVIRONMENT],
        help=f"sources to collect (default: {ENVIRONMENT}, which needs no network)",
    )
    add("--megabytes", type=int, default=50, help="MB of text per source (default: 50)")
    options = parser.parse_args(argv)
    if options.megabytes < 1:
        parser.error(f"--megabytes is {options.megabytes}; give at least 1")
    return run_command("corpus", lambda _: _make(options))


def _make(options: argparse.Namespace) -> int:
    manifest = make_corpus(options.output, options.sources, options.megabytes * 1_000_000)
    for name, entry in manifest["sources"].items():
        print(f"{name}: {entry['documents']:,} documents, {entry['text_bytes'] / 1e6:.1f} MB")
    return 0
