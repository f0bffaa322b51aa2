"""Predict whether a run fits, how long its step takes, and where its teacher should run.

    megatron-let plan --config let_7b --gpus 32 --gpu a100-80g [--pp 4 ...]

It prints memory per rank and a discrete-event simulation of Megatron's schedule with the teacher in
it. `--sweep` ranks the layouts that fit, keeping the TP, PP, VPP and microbatch size given on the
command line; `--break-even` gives the cost of the whole run. With `--engine deepspeed` it prints
GPU and host memory under ZeRO, and the time of the passes. All other flags are Megatron's and
LET's.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_let.cli.common import (
    check_output_file,
    output_console,
    positive,
    run_command,
    say,
)
from megatron_let.config.arguments import flag, let_config_from_args, num_steps
from megatron_let.config.let_config import METHODS, LETConfig
from megatron_let.engines import load_engine
from megatron_let.errors import LETError
from megatron_let.planner.sizes import GPUS, TEACHERS

if TYPE_CHECKING:
    from rich.console import Console

    from megatron_let.planner.break_even import RunCost
    from megatron_let.planner.estimate import Estimate, Request
    from megatron_let.planner.memory import Layout
    from megatron_let.planner.sizes import TransformerSize
    from megatron_let.planner.zero import Zero

_SHORT_FLAGS = {
    "tp": "--tensor-model-parallel-size",
    "pp": "--pipeline-model-parallel-size",
    "cp": "--context-parallel-size",
    "vpp": "--num-virtual-stages-per-pipeline-rank",
    "micro_batch_size": "--micro-batch-size",
}
# Flags of a layout that --sweep chooses itself, or assumes.
_NOT_SWEPT = (
    "--recompute-", "--no-recompute-", "--no-sequence-parallel", "--no-use-distributed-optimizer",
    "--num-layers-per-virtual-pipeline-stage", "--pipeline-model-parallel-layout",
)  # fmt: skip
# Value of a recipe's ${DATA}, ${TEACHER} and so on, of which the plan reads no files.
_UNUSED = "<unused>"
_PICTURES = (".png", ".svg", ".pdf")
# Megatron checks these when a run starts; unset ones have a default.
_AT_LEAST_ONE = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups",
    "kv_channels", "seq_length", "micro_batch_size", "global_batch_size", "vocab_size",
    "make_vocab_size_divisible_by", "num_experts", "moe_ffn_hidden_size", "moe_router_topk",
    "recompute_num_layers", "tensor_model_parallel_size", "pipeline_model_parallel_size",
    "context_parallel_size", "expert_model_parallel_size", "expert_tensor_parallel_size",
    "num_virtual_stages_per_pipeline_rank", "num_layers_per_virtual_pipeline_stage",
)  # fmt: skip
# Of these only the global batch size has a default in Megatron, from the number of ranks.
_REQUIRED = ("hidden_size", "num_attention_heads", "seq_length", "global_batch_size")
# The paper uses a 135M teacher for 1.4B students and a 1.7B teacher for larger ones.
_LARGE_STUDENT = 2e9
# Wide enough for the tables in a pipe, where rich assumes 80 columns.
_WIDTH = 110


def main(argv: list[str] | None = None) -> int:
    """Print the plan; return 0 if it fits, 1 if not, 2 if the request is invalid."""
    options, flags = _parse(argv)
    return run_command("plan", lambda console: _plan(options, flags, console))


def plan_one(argv: list[str]) -> tuple[Request, Estimate]:
    """Return the request and the estimate of a command line without `--sweep`."""
    options, flags = _parse(argv)
    args = megatron_arguments(options.config, flags)
    found = _estimate(_request(args, options), args, options)
    return found.request, found


def _parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Return this command's options, and the flags of Megatron and LET."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", type=Path, required=True, help="recipe: a file or a packaged name")
    add("--gpus", type=positive, required=True, help="number of ranks")
    add("--gpu", choices=sorted(GPUS), required=True)
    for name in _SHORT_FLAGS:
        add(flag(name), type=positive, help="replaces the recipe's value")
    add(
        "--teacher",
        help=f"model folder, or one of {', '.join(TEACHERS)} (default: --let-teacher,"
        " or the paper's)",
    )
    add("--vocab-size", type=positive, help="vocabulary size of the data (default: the teacher's)")
    add("--efficiency", type=float, default=0.5, help="share of the peak FLOP/s (default: 0.5)")
    add("--reserve", type=float, default=0.1, help="share of memory to leave free (default: 0.1)")
    add("--sweep", action="store_true", help="rank all layouts that fit")
    add("--json", action="store_true", help="print JSON instead of a table")
    add("--plot", type=Path, help="draw the stages' timeline (.png, .svg, .pdf)")
    add(
        "--break-even",
        type=Path,
        help="print GPU hours to the baseline's loss by speed-up (of a sweep: for its fastest"
        " layout), and draw them (.png, .svg, .pdf)",
    )
    options, flags = parser.parse_known_args(argv)
    for name, megatron_flag in _SHORT_FLAGS.items():
        if getattr(options, name) is not None:
            flags += [megatron_flag, str(getattr(options, name))]
    return options, flags


def _plan(options: argparse.Namespace, flags: list[str], messages: Console) -> int:
    from megatron_let.compat.device import detect_host, prepare_process

    prepare_process(detect_host(), 0)
    args = megatron_arguments(options.config, flags)
    _check_engine(args, options)
    request = _request(args, options)
    _check_outputs(request, args, options)
    found = (
        _sweep(request, args, options, flags)
        if options.sweep
        else [_estimate(request, args, options)]
    )
    cost = _cost(found[0], args) if options.break_even is not None and found else None
    _print(found, cost, options)
    if not found:
        say(
            messages,
            f"plan: no layout divides over {options.gpus} {options.gpu} and fits their memory; give"
            " more or larger GPUs, or fewer flags that fix the layout.",
            "red",
        )
        return 1
    _draw(found[0], cost, options)
    return 0 if found[0].fits else 1


def _sweep(
    request: Request, args: argparse.Namespace, options: argparse.Namespace, flags: list[str]
) -> list[Estimate]:
    """Return the layouts that fit, among those with the command line's TP, PP and so on."""
    from megatron_let.planner.layouts import sweep

    given = {token.split("=", 1)[0] for token in flags}
    for name in sorted(given):
        if name.startswith(_NOT_SWEPT):
            raise LETError(
                f"--sweep does not take {name}; drop it, or plan one layout without --sweep."
            )
    return sweep(request, args, options.gpus, given)


def _cost(found: Estimate, args: argparse.Namespace) -> RunCost:
    from megatron_let.planner.break_even import run_cost

    stop_step = LETConfig.stop_step if args.let_stop_step is None else args.let_stop_step
    return run_cost(found, num_steps(args), stop_step)


def _print(found: list[Estimate], cost: RunCost | None, options: argparse.Namespace) -> None:
    """Print the estimates, and the cost of the first, as JSON or tables."""
    from megatron_let.planner import display

    console, titles = output_console(_WIDTH), (options.config.stem, options.gpu)
    if options.json:
        values = [display.as_json(each) for each in found]
        if cost is not None:
            values[0]["break_even"] = display.break_even_as_json(cost)
        print(json.dumps(values if options.sweep else values[0], indent=2))
        return
    if options.sweep and found:
        display.print_sweep(console, found, *titles)
    elif found:
        display.print_estimate(console, found[0], *titles)
    if cost is not None:
        display.print_break_even(console, cost)


def _draw(found: Estimate, cost: RunCost | None, options: argparse.Namespace) -> None:
    from megatron_let.planner import display

    if options.plot is not None:
        display.plot_stages(found, options.plot)
    if cost is not None:
        display.plot_break_even(cost, options.break_even)


def megatron_arguments(config: Path, flags: list[str]) -> argparse.Namespace:
    """Return a recipe and the flags after it as Megatron parses them, not validated."""
    from megatron.training.arguments import add_megatron_arguments

    from megatron_let.config.arguments import add_arguments
    from megatron_let.config.recipes import load_recipe, recipe_argv

    parser = add_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
    variables = dict.fromkeys(("DATA", "TEACHER", "OUTPUT", "TOKENIZER"), _UNUSED)
    variables = {**os.environ, **variables}
    args = parser.parse_args(recipe_argv(load_recipe(config), parser, flags, variables))
    required = _REQUIRED if args.hybrid_layer_pattern else ("num_layers", *_REQUIRED)
    for name in required:
        if getattr(args, name) is None:
            raise LETError(f"{flag(name)} is not set; give it here or in {config}.")
    for name in _AT_LEAST_ONE:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise LETError(f"{flag(name)} is {value}; give at least 1.")
    return args


def _check_shares(options: argparse.Namespace) -> None:
    if not 0 < options.efficiency <= 1:
        raise LETError(f"--efficiency is {options.efficiency}; give more than 0 and at most 1.")
    if not 0 <= options.reserve < 1:
        raise LETError(f"--reserve is {options.reserve}; give at least 0 and less than 1.")


def _check_method(args: argparse.Namespace) -> None:
    """Check the method and its settings, as a run does."""
    learns_from = METHODS[args.let_method or "none"].learns_from
    if learns_from is None:
        return
    if learns_from == "logits":
        raise LETError(
            f"The planner does not count --let-method {args.let_method}; measure a few steps of the"
            " run instead."
        )
    args.let_teacher = args.let_teacher or Path(_UNUSED)
    layer, num_layers = let_config_from_args(args).layer, args.num_layers
    if layer > num_layers:
        raise LETError(
            f"--let-layer is {layer} but the student has {num_layers} layers; give a number from 1"
            f" to {num_layers}."
        )


def _check_outputs(request: Request, args: argparse.Namespace, options: argparse.Namespace) -> None:
    """Check that there is something to draw, and that it can be written."""
    for name in ("plot", "break_even"):
        path = getattr(options, name)
        if path is None:
            continue
        if request.teacher is None:
            raise LETError(
                f"{flag(name)} shows where a teacher runs or what it costs, and this run has no"
                " teacher; give --let-method let."
            )
        if path.suffix.lower() not in _PICTURES:
            raise LETError(f"{flag(name)} {path} is not a picture; end it in .png, .svg or .pdf.")
        check_output_file(path)
    has_steps = args.train_iters is not None or args.train_samples is not None
    steps = num_steps(args) if has_steps else 0
    if options.break_even is not None and steps < 1:
        raise LETError(
            f"--break-even needs the steps of the run, which has {steps}; give --train-iters at"
            " least 1."
        )


def _teacher(
    student: TransformerSize, args: argparse.Namespace, options: argparse.Namespace
) -> str:
    """Return the name or folder of the teacher: that of the flags, or the paper's."""
    if options.teacher:
        return str(options.teacher)
    given, learns_from = args.let_teacher, METHODS[args.let_method or "none"].learns_from
    if learns_from is not None and given is not None and _UNUSED not in given.parts:
        # Nothing is downloaded: a hub id, or a folder of another machine, is known by its name.
        known = given.name.partition("@")[0].lower()
        return known if known in TEACHERS and not given.exists() else str(given)
    large = student.num_layers * student.active_layer_params > _LARGE_STUDENT
    return "smollm2-1.7b" if large else "smollm2-135m"


def _request(args: argparse.Namespace, options: argparse.Namespace) -> Request:
    from megatron_let.config.arguments import layer_number
    from megatron_let.planner.estimate import Request
    from megatron_let.planner.sizes import student_size, teacher_size

    _check_shares(options)
    rough = student_size(args, 1, 1)
    _check_method(args)
    teacher = teacher_size(_teacher(rough, args, options))
    has_teacher = METHODS[args.let_method or "none"].learns_from == "states"
    vocab_size = options.vocab_size or args.vocab_size or teacher.vocab_size
    return Request(
        student=student_size(args, vocab_size, args.tensor_model_parallel_size),
        teacher=_as_it_runs(teacher, args) if has_teacher else None,
        layer=layer_number(args),
        seq_length=args.seq_length,
        gpu=GPUS[options.gpu],
        efficiency=options.efficiency,
        max_prefetch=args.let_max_prefetch,
        reserve=options.reserve,
    )


def _as_it_runs(teacher: TransformerSize, args: argparse.Namespace) -> TransformerSize:
    """Return the teacher's layers up to the tapped one, in its precision.

    Raises:
        LETError: the planner does not count this teacher.
    """
    from megatron_let.teacher.model import tapped_layer

    if teacher.experts is not None or args.let_cross_tokenizer:
        what = "the experts of the teacher" if teacher.experts else "--let-cross-tokenizer"
        raise LETError(
            f"The planner does not count the memory and time of {what}; measure a few steps of the"
            " run instead."
        )
    # All planned devices are GPUs, on which `auto` is bf16.
    num_bytes = 4 if args.let_teacher_dtype == "fp32" else teacher.num_bytes
    layers = tapped_layer(args.let_teacher_layer or "last", teacher.num_layers)
    return dataclasses.replace(teacher, num_layers=layers, num_bytes=num_bytes)


def _estimate(request: Request, args: argparse.Namespace, options: argparse.Namespace) -> Estimate:
    """Estimate the layout of the arguments on the engine of the arguments."""
    from megatron_let.planner.estimate import estimate
    from megatron_let.planner.layouts import layout_from_args
    from megatron_let.planner.zero import estimate_zero

    layout = layout_from_args(args, options.gpus)
    if args.engine == "deepspeed":
        return estimate_zero(request, layout, _zero(args, layout))
    return estimate(request, layout)


def _check_engine(args: argparse.Namespace, options: argparse.Namespace) -> None:
    for name in ("sweep", "plot"):
        if args.engine == "deepspeed" and getattr(options, name):
            raise LETError(
                f"{flag(name)} is about pipelines, which --engine deepspeed does not have; plan one"
                " layout, or give --engine megatron."
            )
    load_engine(args.engine).check_arguments(args)


def _zero(args: argparse.Namespace, layout: Layout) -> Zero:
    """Return the run's ZeRO settings, from its DeepSpeed config as the engine completes it."""
    from megatron_let.planner.zero import zero_from_config

    # Megatron's validation sets these two in a run.
    args.data_parallel_size = layout.dp
    args.accumulate_allreduce_grads_in_fp32 = True
    config = load_engine(args.engine).config_from_args(args, cuda=True)
    return zero_from_config(config, args.let_teacher_shard)
