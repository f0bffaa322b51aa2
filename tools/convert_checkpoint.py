"""Convert, verify and inspect checkpoints: `megatron-let convert` (cli/convert.py)."""

from megatron_let.cli.convert import main

if __name__ == "__main__":
    raise SystemExit(main())
