"""Tokenize text into Megatron's indexed data: `megatron-let preprocess` (cli/preprocess.py)."""

from megatron_let.cli.preprocess import main

if __name__ == "__main__":
    raise SystemExit(main())
