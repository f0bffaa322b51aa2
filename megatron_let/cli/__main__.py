"""The console command `megatron-let`, also `python -m megatron_let.cli`."""

import importlib
import sys

# Name -> (module with `main(argv) -> exit code`, one-line help). Imported only when chosen.
COMMANDS = {
    "train": ("megatron_let.cli.train", "run one pretraining, alone or under torchrun"),
    "plan": ("megatron_let.cli.plan", "predict memory, step time and the teacher's placement"),
    "preprocess": ("megatron_let.cli.preprocess", "tokenize text into Megatron's indexed data"),
    "convert": ("megatron_let.cli.convert", "convert, verify and inspect checkpoints"),
    "evaluate": ("megatron_let.cli.evaluate", "run the paper's nine tasks, measure perplexity"),
    "compare": ("megatron_let.cli.compare", "compare finished runs with their baseline"),
    "sweep": ("megatron_let.cli.sweep", "train a list of variants and compare them"),
    "curvature": ("megatron_let.cli.curvature", "measure the Hessian of the losses by depth"),
    "doctor": ("megatron_let.doctor.__main__", "check whether this machine can train"),
    "quickstart": ("megatron_let.cli.quickstart", "train a student without and with a teacher"),
    "status": ("megatron_let.cli.status", "show the progress of a run of launch/"),
    "time-series": ("megatron_let.cli.time_series", "classify time series without and with LET"),
    "corpus": ("megatron_let.cli.corpus", "collect text for experiments"),
}


def main(argv: list[str] | None = None) -> int:
    """Run the subcommand that `argv` names; return its exit code, 2 if there is no such name."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(_help())
        return 0 if argv else 2
    name, *rest = argv
    if name not in COMMANDS:
        print(
            f"megatron-let: error: unknown command {name!r}; choose one of {', '.join(COMMANDS)}",
            file=sys.stderr,
        )
        return 2
    # argparse prints sys.argv[0] in a usage line, and provenance records it.
    sys.argv = [f"megatron-let {name}", *rest]
    code: int = importlib.import_module(COMMANDS[name][0]).main(rest)
    return code


def _help() -> str:
    lines = [f"  {name:<11} {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: megatron-let COMMAND [ARGUMENTS]",
            "",
            *lines,
            "",
            "`megatron-let COMMAND --help` lists a command's arguments. `--config` takes a file or",
            "the name of a packaged recipe, such as let_1p4b. Several processes are started by",
            "torchrun: torchrun --nproc-per-node 8 -m megatron_let.cli train --config let_1p4b",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
