"""Predict memory, step time and the teacher's placement: `megatron-let plan` (cli/plan.py)."""

import sys

from megatron_let.cli.plan import main

if __name__ == "__main__":
    sys.exit(main())
