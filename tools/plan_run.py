"""Predict memory, step time and the teacher's placement: `megatron-let plan` (cli/plan.py)."""

from megatron_let.cli.plan import main

if __name__ == "__main__":
    raise SystemExit(main())
