"""Will a run fit, how long is its step, and where should its teacher run? Before it starts.

    python tools/plan_run.py --config configs/let_7b.yaml --gpus 32 --gpu a100-80g [--pp 4 ...]

Memory of each rank, arithmetic, and a discrete-event simulation of Megatron's schedule with the
teacher in it. `--sweep` ranks the layouts that fit. Under `--engine deepspeed`, memory by ZeRO
stage on the GPU and on the host, and a step time from what is computed and moved. Other flags are
Megatron's and LET's.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_let.compat.device import detect_host, prepare_process
from megatron_let.config.recipes import RecipeError, load_recipe, recipe_argv
from megatron_let.engines import load_engine
from megatron_let.errors import LETError
from megatron_let.placement.choose import steady_timeline
from megatron_let.planner.estimate import (
    GPUS,
    Estimate,
    Request,
    estimate,
    fits,
    share_of_training,
)
from megatron_let.planner.memory import Layout
from megatron_let.planner.sizes import TEACHERS, TransformerSize, student_size, teacher_size
from megatron_let.planner.zero import (
    Zero,
    assumptions,
    estimate_zero,
    step_seconds,
    zero_from_config,
)

# The paper teaches students of 1.4B with 135M and larger ones with 1.7B.
_LARGE_STUDENT = 2e9
_SHORT_FLAGS = {
    "tp": "--tensor-model-parallel-size",
    "pp": "--pipeline-model-parallel-size",
    "cp": "--context-parallel-size",
    "micro_batch_size": "--micro-batch-size",
}
_COLUMNS = ("params", "grads", "optimizer", "activations", "buffers", "teacher_weights",
            "teacher_buffers", "total", "host")  # fmt: skip
_SPAN_COLOURS = {"forward": "#9ecae1", "backward": "#4292c6", "teacher": "#fd8d3c"}


def main(argv: list[str] | None = None) -> int:
    """Print the plan; return 0 if it fits, 1 if not, 2 if it cannot be made."""
    prepare_process(detect_host(), 0)
    options, rest = _parse(argv)
    try:
        args = _megatron_arguments(options, rest)
        request = _request(options, args)
        if args.engine == "deepspeed":
            _refuse_pipelines(options)
            estimates = [_plan_zero(request, args, options)]
        elif options.sweep:
            estimates = _sweep(request, args, options.gpus)
            _print_sweep(request, estimates, options)
        else:
            estimates = [estimate(request, _layout(args, options.gpus, options.vpp))]
            _print_one(request, estimates[0], options)
        if options.plot is not None:
            _plot(request, estimates[0], options.plot)
    except (LETError, RecipeError) as error:
        print(f"plan_run: error: {error}", file=sys.stderr)
        return 2
    return 0 if estimates and estimates[0].fits else 1


def plan_one(argv: list[str]) -> tuple[Request, Estimate]:
    """What a command line without `--sweep` asks for, and its estimate.

    Raises:
        LETError, RecipeError: it cannot be made.
    """
    options, rest = _parse(argv)
    args = _megatron_arguments(options, rest)
    request = _request(options, args)
    return request, estimate(request, _layout(args, options.gpus, options.vpp))


def _parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--config", type=Path, required=True, help="recipe")
    parser.add_argument("--gpus", type=int, required=True, help="ranks of the run")
    parser.add_argument("--gpu", choices=sorted(GPUS), required=True)
    for name in _SHORT_FLAGS:
        parser.add_argument("--" + name.replace("_", "-"), type=int, help="instead of the recipe's")
    parser.add_argument("--vpp", type=int, default=1, help="model chunks of a stage (default: 1)")
    parser.add_argument(
        "--teacher", help=f"a model folder, or one of {', '.join(TEACHERS)} (default: the paper's)"
    )
    parser.add_argument("--vocab-size", type=int, help="of the data (default: the teacher's)")
    parser.add_argument(
        "--efficiency", type=float, default=0.5, help="of matrix products (default: 0.5)"
    )
    parser.add_argument(
        "--reserve", type=float, default=0.1, help="share of memory to leave (default: 0.1)"
    )
    parser.add_argument("--sweep", action="store_true", help="rank all layouts that fit")
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")
    parser.add_argument("--plot", type=Path, help="picture of the stages' time (.png, .svg)")
    return parser.parse_known_args(argv)


def _megatron_arguments(options: argparse.Namespace, rest: list[str]) -> argparse.Namespace:
    """The recipe and the flags after it, as Megatron parses them, without its validation."""
    from megatron.training.arguments import add_megatron_arguments

    from megatron_let.config.arguments import add_arguments

    parser = add_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
    for name, flag in _SHORT_FLAGS.items():
        if getattr(options, name) is not None:
            rest = [*rest, flag, str(getattr(options, name))]
    # Folders are of no interest here.
    variables = dict.fromkeys(("DATA", "TEACHER", "OUTPUT", "TOKENIZER"), "unused")
    return parser.parse_args(recipe_argv(load_recipe(options.config), parser, rest, variables))


def _request(options: argparse.Namespace, args: argparse.Namespace) -> Request:
    rough = student_size(args, 1, 1)
    name = options.teacher or (
        "smollm2-1.7b" if rough.num_layers * rough.layer_params > _LARGE_STUDENT else "smollm2-135m"
    )
    teacher = teacher_size(name)
    vocab_size = options.vocab_size or args.vocab_size or teacher.vocab_size
    return Request(
        student=student_size(args, vocab_size, args.tensor_model_parallel_size),
        teacher=teacher if args.let_method == "let" else None,
        layer=args.let_layer or 3,
        seq_length=args.seq_length,
        gpu=GPUS[options.gpu],
        efficiency=options.efficiency,
        max_prefetch=args.let_max_prefetch,
        reserve=options.reserve,
    )


def _layout(args: argparse.Namespace, gpus: int, vpp: int) -> Layout:
    """The layout that the arguments ask for.

    Raises:
        LETError: a size does not divide.
    """
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    cp, b = args.context_parallel_size, args.micro_batch_size
    dp = gpus // (tp * pp * cp)
    if dp * tp * pp * cp != gpus:
        raise LETError(f"--gpus {gpus} is no multiple of TP {tp} x PP {pp} x CP {cp}.")
    if args.global_batch_size % (b * dp):
        raise LETError(
            f"--global-batch-size {args.global_batch_size} is no multiple of --micro-batch-size"
            f" {b} x {dp} replicas."
        )
    layout = Layout(
        tp=tp,
        pp=pp,
        cp=cp,
        dp=dp,
        num_chunks=vpp,
        micro_batch_size=b,
        num_microbatches=args.global_batch_size // (b * dp),
        recompute=_recompute(args),
        recompute_layers=args.recompute_num_layers or 0,
        sequence_parallel=args.sequence_parallel or tp == 1,
        distributed_optimizer=args.use_distributed_optimizer,
    )
    problem = _does_not_divide(layout, student_size(args, 1, 1))
    if problem is not None:
        raise LETError(problem)
    return layout


def _refuse_pipelines(options: argparse.Namespace) -> None:
    for flag in ("sweep", "plot"):
        if getattr(options, flag):
            raise LETError(
                f"--{flag} is about pipelines, which --engine deepspeed has none of; plan one"
                " layout, or give --engine megatron."
            )


def _plan_zero(request: Request, args: argparse.Namespace, options: argparse.Namespace) -> Estimate:
    """Print the plan of a run on DeepSpeed's engine."""
    load_engine(args.engine).check_arguments(args)
    layout = _layout(args, options.gpus, options.vpp)
    zero = _zero(args, layout)
    found = estimate_zero(request, layout, zero)
    if options.json:
        print(json.dumps(_zero_json(request, found, zero), indent=2))
    else:
        _print_one(request, found, options)
        _print_zero(request, found, zero)
    return found


def _zero(args: argparse.Namespace, layout: Layout) -> Zero:
    """The run's DeepSpeed config, completed as the engine does it, as the planner needs it."""
    # What Megatron's validation would have set.
    args.data_parallel_size = layout.dp
    args.accumulate_allreduce_grads_in_fp32 = True
    config = load_engine(args.engine).config_from_args(args, cuda=True)
    return zero_from_config(config, args.let_teacher_shard)


def _recompute(args: argparse.Namespace) -> Any:
    if args.recompute_granularity != "full":
        return "none"
    return "block" if args.recompute_method == "block" else "full"


def _does_not_divide(layout: Layout, student: TransformerSize) -> str | None:
    num_layers, num_heads = student.num_layers, student.num_heads
    if num_layers % (layout.pp * layout.num_chunks):
        return (
            f"{num_layers} layers do not divide over PP {layout.pp} x {layout.num_chunks} chunks."
        )
    if num_heads % layout.tp:
        return f"{num_heads} attention heads do not divide over TP {layout.tp}."
    if student.ffn_hidden_size % layout.tp:
        return f"--ffn-hidden-size {student.ffn_hidden_size} does not divide over TP {layout.tp}."
    if layout.num_chunks > 1 and (layout.pp == 1 or layout.num_microbatches % layout.pp):
        return (
            f"{layout.num_microbatches} microbatches do not divide over PP {layout.pp}, which"
            " several chunks of a stage need."
        )
    return None


def _sweep(request: Request, args: argparse.Namespace, gpus: int) -> list[Estimate]:
    """All layouts that fit, the fastest first."""
    estimates = (
        estimate(request, layout)
        for layout in _layouts(args, gpus)
        if _does_not_divide(layout, request.student) is None and fits(request, layout)
    )
    return sorted((e for e in estimates if e.fits), key=lambda e: e.best_seconds)


def _layouts(args: argparse.Namespace, gpus: int) -> Iterator[Layout]:
    sizes = (1, 2, 4, 8)
    for tp, pp, vpp, b, recompute in itertools.product(
        sizes, sizes, (1, 2), (1, 2, 4, 8, 16), ("none", "full")
    ):
        cp = args.context_parallel_size
        dp, left = divmod(gpus, tp * pp * cp)
        if left or dp == 0 or args.global_batch_size % (b * dp):
            continue
        n = args.global_batch_size // (b * dp)
        yield Layout(tp, pp, cp, dp, vpp, b, n, recompute)  # type: ignore[arg-type]


def _name(layout: Layout) -> str:
    parts = [f"TP{layout.tp}", f"PP{layout.pp}", f"DP{layout.dp}"]
    parts += [f"CP{layout.cp}"] if layout.cp > 1 else []
    parts += [f"VPP{layout.num_chunks}"] if layout.num_chunks > 1 else []
    return " ".join([*parts, f"b{layout.micro_batch_size} x {layout.num_microbatches}"])


def _tokens_per_second(request: Request, found: Estimate) -> float:
    layout = found.layout
    samples = layout.micro_batch_size * layout.num_microbatches * layout.dp
    return samples * request.seq_length / found.best_seconds


def _as_json(request: Request, found: Estimate) -> dict[str, Any]:
    return {
        "layout": dataclasses.asdict(found.layout),
        "memory_gib": [stage.gib() for stage in found.memory],
        "teacher_share_of_training_flops": share_of_training(request),
        "baseline_seconds": found.baseline_seconds,
        "seconds": found.seconds,
        "ratio": {name: s / found.baseline_seconds for name, s in found.seconds.items()},
        "placement": found.placement,
        "tokens_per_second": _tokens_per_second(request, found),
        "fits": found.fits,
    }


def _zero_json(request: Request, found: Estimate, zero: Zero) -> dict[str, Any]:
    parts = step_seconds(request, found.layout, zero)
    return _as_json(request, found) | {
        "zero": dataclasses.asdict(zero),
        "parts_seconds": dataclasses.asdict(parts),
        "assumptions": assumptions(request, found.layout, zero),
    }


def _print_zero(request: Request, found: Estimate, zero: Zero) -> None:
    console, parts = _console(), step_seconds(request, found.layout, zero)
    console.print(
        f"ZeRO-{zero.stage}; of a step without teacher: passes {parts.passes:.2f} s, ZeRO's"
        f" communication {parts.data_parallel:.2f} s, offload {parts.offload:.2f} s"
    )
    for line in assumptions(request, found.layout, zero):
        console.print(f"- {line}", highlight=False)


def _console() -> Console:
    # Away from a terminal, the 80 columns that rich assumes would break the tables.
    return Console(width=None if sys.stdout.isatty() else 110)


def _print_one(request: Request, found: Estimate, options: argparse.Namespace) -> None:
    if options.json:
        print(json.dumps(_as_json(request, found), indent=2))
        return
    console = _console()
    table = Table(
        title=f"{options.config.stem}: {_name(found.layout)} on {options.gpu}, GiB a rank"
    )
    # A Megatron run has neither buffers of ZeRO nor anything on the host.
    columns = [c for c in _COLUMNS if c not in ("buffers", "host") or getattr(found.peak, c)]
    for heading in ("stage", *(c.replace("_", " ") for c in columns)):
        table.add_column(heading, justify="right")
    for index, stage in enumerate(found.memory):
        gib = stage.gib()
        table.add_row(str(index), *(f"{gib[c]:.2f}" for c in columns))
    console.print(table)
    limit = request.gpu.memory / 2**30
    verdict = "fits" if found.fits else "does NOT fit"
    console.print(
        f"{verdict}: {found.peak.total / 2**30:.1f} of {limit:.1f} GiB,"
        f" {options.reserve:.0%} of which are to stay free"
    )
    if found.peak.host:
        console.print(f"and {found.peak.host / 2**30:.0f} GiB of the host's memory for each rank")
    _print_times(console, request, found)


def _print_times(console: Console, request: Request, found: Estimate) -> None:
    table = Table(title=f"simulated passes of one step at {request.efficiency:.0%} efficiency")
    for heading in ("teacher", "seconds", "over baseline"):
        table.add_column(heading, justify="right")
    table.add_row("none", f"{found.baseline_seconds:.2f}", "1.000")
    for name, seconds in found.seconds.items():
        best = " (best)" if name == found.placement else ""
        table.add_row(name + best, f"{seconds:.2f}", f"{seconds / found.baseline_seconds:.3f}")
    console.print(table)
    console.print(
        f"teacher's forward: {share_of_training(request):.2%} of the student's training FLOPs;"
        f" {_tokens_per_second(request, found):,.0f} tokens a second"
    )


def _print_sweep(request: Request, found: list[Estimate], options: argparse.Namespace) -> None:
    if options.json:
        print(json.dumps([_as_json(request, each) for each in found], indent=2))
        return
    table = Table(title=f"{options.config.stem}: {len(found)} layouts fit {options.gpu}")
    for heading in (
        "layout",
        "recompute",
        "GiB",
        "step s",
        "placement",
        "over baseline",
        "tokens/s",
    ):
        table.add_column(heading, justify="right")
    for each in found[:20]:
        table.add_row(
            _name(each.layout),
            each.layout.recompute,
            f"{each.peak.total / 2**30:.1f}",
            f"{each.best_seconds:.2f}",
            each.placement or "none",
            f"{each.best_seconds / each.baseline_seconds:.3f}",
            f"{_tokens_per_second(request, each):,.0f}",
        )
    _console().print(table)


def _plot(request: Request, found: Estimate, path: Path) -> None:
    """Bars of what each stage does, one panel a placement."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    if not found.seconds:
        raise LETError("--plot shows where a teacher runs, and this run has none.")
    longest = max(found.seconds.values())
    stages = found.layout.pp
    figure, panels = pyplot.subplots(
        len(found.seconds),
        sharex=True,
        figsize=(11, 1 + (0.6 + 0.35 * stages) * len(found.seconds)),
    )
    for panel, name in zip(panels, found.seconds, strict=True):
        timeline = steady_timeline(
            name, found.layout.pipeline, found.costs, found.owner, request.prefetch(found.layout)
        )
        for stage, spans in enumerate(timeline.spans):
            panel.broken_barh(
                [(span.start, span.end - span.start) for span in spans],
                (stage - 0.4, 0.8),
                facecolors=[_SPAN_COLOURS[span.kind] for span in spans],
                edgecolor="white",
                linewidth=0.4,
            )
        ratio = timeline.duration / found.baseline_seconds
        panel.set_title(f"{name}: {ratio:.3f} of a step without teacher", loc="left", fontsize=9)
        panel.set_yticks(range(stages), [f"stage {stage}" for stage in range(stages)], fontsize=7)
        panel.invert_yaxis()
        panel.axvline(found.baseline_seconds, color="grey", linestyle=":")
        panel.set_xlim(0, longest)
    panels[-1].set_xlabel("seconds (dotted: the step's end without a teacher)")
    legend = [Patch(color=colour, label=kind) for kind, colour in _SPAN_COLOURS.items()]
    figure.legend(handles=legend, loc="upper right", ncols=3, fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    sys.exit(main())
