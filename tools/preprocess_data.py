"""Tokenize text into Megatron's indexed data: `megatron-let preprocess` (cli/preprocess.py)."""

import sys

from megatron_let.cli.preprocess import main

if __name__ == "__main__":
    sys.exit(main())
