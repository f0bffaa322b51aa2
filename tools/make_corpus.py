"""Collect real text for experiments: `megatron-let corpus` (cli/corpus.py)."""

from megatron_let.cli.corpus import main

if __name__ == "__main__":
    raise SystemExit(main())
