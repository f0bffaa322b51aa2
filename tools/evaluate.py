"""Run the paper's nine tasks and measure perplexity: `megatron-let evaluate` (cli/evaluate.py)."""

from megatron_let.cli.evaluate import main

if __name__ == "__main__":
    raise SystemExit(main())
