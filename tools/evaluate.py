"""Run the paper's nine tasks and measure perplexity: `megatron-let evaluate` (cli/evaluate.py)."""

import sys

from megatron_let.cli.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
