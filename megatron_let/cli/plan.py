"""Predict whether a run fits, how long its step takes, and where its teacher should run.

    megatron-let plan --config let_7b --gpus 32 --gpu a100-80g [--pp 4 ...]

It prints memory per rank and a discrete-event simulation of Megatron's schedule with the teacher in
it. `--sweep` ranks the layouts that fit. With `--engine deepspeed` it prints GPU and host memory by
ZeRO stage, and a step time from FLOPs and communication. All other flags are Megatron's and LET's.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_let.cli.common import output_console, run_command
from megatron_let.errors import LETError
from megatron_let.planner.hardware import GPUS
from megatron_let.planner.sizes import TEACHERS

if TYPE_CHECKING:
    from megatron_let.planner.estimate import Estimate, Request
    from megatron_let.planner.memory import Layout
    from megatron_let.planner.zero import Zero

_SHORT_FLAGS = {
    "tp": "--tensor-model-parallel-size",
    "pp": "--pipeline-model-parallel-size",
    "cp": "--context-parallel-size",
    "micro_batch_size": "--micro-batch-size",
}
# Wide enough for the tables in a pipe, where rich assumes 80 columns.
_WIDTH = 110


def main(argv: list[str] | None = None) -> int:
    """Print the plan; return 0 if it fits, 1 if not, 2 if the request is invalid."""
    options, rest = _parse(argv)
    return run_command("plan", lambda _: _plan(options, rest))


def plan_one(argv: list[str]) -> tuple[Request, Estimate]:
    """Estimate the one layout that a command line without `--sweep` describes.

    Raises:
        LETError, RecipeError: the request is invalid.
    """
    from megatron_let.planner.estimate import estimate

    options, rest = _parse(argv)
    request, args = _request(options, rest)
    return request, estimate(request, _layout(args, options))


def _parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", type=Path, required=True, help="recipe: a file or a packaged name")
    add("--gpus", type=int, required=True, help="number of ranks")
    add("--gpu", choices=sorted(GPUS), required=True)
    for name in _SHORT_FLAGS:
        add("--" + name.replace("_", "-"), type=int, help="replaces the recipe's value")
    add("--vpp", type=int, default=1, help="model chunks per stage (default: 1)")
    add("--teacher", help=f"model folder, or one of {', '.join(TEACHERS)} (default: the paper's)")
    add("--vocab-size", type=int, help="of the data (default: the teacher's)")
    add("--efficiency", type=float, default=0.5, help="of matrix products (default: 0.5)")
    add("--reserve", type=float, default=0.1, help="share of memory to leave free (default: 0.1)")
    add("--sweep", action="store_true", help="rank all layouts that fit")
    add("--json", action="store_true", help="print JSON instead of a table")
    add("--plot", type=Path, help="draw the stages' timeline (.png, .svg)")
    return parser.parse_known_args(argv)


def _plan(options: argparse.Namespace, rest: list[str]) -> int:
    from megatron_let.compat.device import detect_host, prepare_process

    prepare_process(detect_host(), 0)
    request, args = _request(options, rest)
    if args.engine == "deepspeed":
        estimates = [_plan_zero(request, args, options)]
    else:
        estimates = _plan_megatron(request, args, options)
    return 0 if estimates and estimates[0].fits else 1


def _request(options: argparse.Namespace, rest: list[str]) -> tuple[Request, argparse.Namespace]:
    """Return the planner's request, and the recipe and flags as Megatron parses them."""
    from megatron.training.arguments import add_megatron_arguments

    from megatron_let.config.arguments import add_arguments
    from megatron_let.config.recipes import load_recipe, recipe_argv
    from megatron_let.planner.layouts import request_from_args

    parser = add_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
    for name, flag in _SHORT_FLAGS.items():
        if getattr(options, name) is not None:
            rest = [*rest, flag, str(getattr(options, name))]
    # The plan reads none of these folders.
    variables = dict.fromkeys(("DATA", "TEACHER", "OUTPUT", "TOKENIZER"), "unused")
    args = parser.parse_args(recipe_argv(load_recipe(options.config), parser, rest, variables))
    request = request_from_args(
        args,
        options.gpu,
        options.teacher,
        options.vocab_size,
        options.efficiency,
        options.reserve,
    )
    return request, args


def _layout(args: argparse.Namespace, options: argparse.Namespace) -> Layout:
    from megatron_let.planner.layouts import layout_from_args

    return layout_from_args(args, options.gpus, options.vpp)


def _plan_megatron(
    request: Request, args: argparse.Namespace, options: argparse.Namespace
) -> list[Estimate]:
    """Print the plan of a run on Megatron's engine."""
    from megatron_let.planner import report
    from megatron_let.planner.estimate import estimate
    from megatron_let.planner.layouts import sweep

    console, recipe = output_console(_WIDTH), options.config.stem
    if options.sweep:
        found = sweep(request, args, options.gpus)
    else:
        found = [estimate(request, _layout(args, options))]
    values = [report.as_json(each) for each in found]
    if options.json:
        print(json.dumps(values if options.sweep else values[0], indent=2))
    elif options.sweep:
        report.print_sweep(console, found, recipe, options.gpu)
    else:
        report.print_estimate(console, found[0], recipe, options.gpu)
    if options.plot is not None:
        report.plot_stages(found[0], options.plot)
    return found


def _plan_zero(request: Request, args: argparse.Namespace, options: argparse.Namespace) -> Estimate:
    """Print the plan of a run on DeepSpeed's engine."""
    from megatron_let.engines.deepspeed.refusals import check_supported
    from megatron_let.planner import report
    from megatron_let.planner.zero import estimate_zero

    for flag in ("sweep", "plot"):
        if getattr(options, flag):
            raise LETError(
                f"--{flag} is about pipelines, which --engine deepspeed does not have; plan one"
                " layout, or give --engine megatron."
            )
    check_supported(args)
    layout = _layout(args, options)
    zero = _zero(args, layout)
    found = estimate_zero(request, layout, zero)
    if options.json:
        print(json.dumps(report.zero_as_json(found, zero), indent=2))
    else:
        console = output_console(_WIDTH)
        report.print_estimate(console, found, options.config.stem, options.gpu)
        report.print_zero(console, found, zero)
    return found


def _zero(args: argparse.Namespace, layout: Layout) -> Zero:
    """Return the run's ZeRO settings, from its DeepSpeed config as the engine completes it."""
    from megatron_let.engines.deepspeed.ds_config import complete_config, read_config
    from megatron_let.engines.deepspeed.recipe import recipe_from_args
    from megatron_let.planner.zero import zero_from_config

    # Megatron's validation sets these two in a run.
    args.data_parallel_size = layout.dp
    args.accumulate_allreduce_grads_in_fp32 = True
    given = read_config(args.deepspeed_config) if args.deepspeed_config else {}
    config = complete_config(given, recipe_from_args(args), fused_adam=True)
    return zero_from_config(config, args.let_teacher_shard)
