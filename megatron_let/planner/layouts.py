"""Parallel layouts: from Megatron's arguments, and all those that fit a number of GPUs."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Collection, Iterator

from megatron_let.config.arguments import flag
from megatron_let.errors import LETError
from megatron_let.planner.estimate import Estimate, Request, estimate, memory_of_stages
from megatron_let.planner.memory import Layout, Recompute
from megatron_let.planner.sizes import Experts, TransformerSize, student_size

# What a sweep tries, by argument.
_TRIED = {
    "tensor_model_parallel_size": (1, 2, 4, 8),
    "pipeline_model_parallel_size": (1, 2, 4, 8, 16),
    "num_virtual_stages_per_pipeline_rank": (1, 2, 5),
    "micro_batch_size": (1, 2, 4, 8, 16),
}
_RECOMPUTE: tuple[Recompute, ...] = ("none", "full")


def layout_from_args(args: argparse.Namespace, gpus: int) -> Layout:
    """Build the layout that Megatron's parsed arguments describe.

    Raises:
        LETError: a size does not divide.
    """
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    cp, b = args.context_parallel_size, args.micro_batch_size
    if b is None:
        raise LETError("--micro-batch-size is not set; give it, or --sweep.")
    dp = gpus // (tp * pp * cp)
    if dp * tp * pp * cp != gpus:
        raise LETError(f"--gpus {gpus} is not a multiple of TP {tp} x PP {pp} x CP {cp}.")
    if args.global_batch_size % (b * dp):
        raise LETError(
            f"--global-batch-size {args.global_batch_size} is not a multiple of --micro-batch-size"
            f" {b} x {dp} replicas."
        )
    recompute: Recompute = "none"
    if args.recompute_granularity == "full":
        recompute = "block" if args.recompute_method == "block" else "full"
    layout = Layout(
        tp=tp,
        pp=pp,
        cp=cp,
        dp=dp,
        num_chunks=_chunks(args, pp),
        micro_batch_size=b,
        num_microbatches=args.global_batch_size // (b * dp),
        recompute=recompute,
        recompute_layers=args.recompute_num_layers or 0,
        sequence_parallel=args.sequence_parallel or tp == 1,
        distributed_optimizer=args.use_distributed_optimizer,
        ep=args.expert_model_parallel_size,
        etp=args.expert_tensor_parallel_size,
    )
    problem = does_not_divide(layout, student_size(args, 1, 1))
    if problem is not None:
        raise LETError(problem)
    return layout


def _chunks(args: argparse.Namespace, pp: int) -> int:
    """Return the model chunks per stage."""
    if args.pipeline_model_parallel_layout:
        raise LETError(
            f"--pipeline-model-parallel-layout {args.pipeline_model_parallel_layout} cannot be"
            " planned; give equal stages instead."
        )
    layers = args.num_layers_per_virtual_pipeline_stage
    if not layers:
        return args.num_virtual_stages_per_pipeline_rank or 1
    if args.num_virtual_stages_per_pipeline_rank:
        raise LETError(
            f"--num-layers-per-virtual-pipeline-stage is {layers} and"
            " --num-virtual-stages-per-pipeline-rank is"
            f" {args.num_virtual_stages_per_pipeline_rank}; give one of them."
        )
    if args.num_layers % (pp * layers):
        raise LETError(
            f"--num-layers {args.num_layers} is not a multiple of PP {pp} x"
            f" --num-layers-per-virtual-pipeline-stage {layers}."
        )
    return int(args.num_layers // (pp * layers))


def sweep(
    request: Request, args: argparse.Namespace, gpus: int, given: Collection[str] = ()
) -> list[Estimate]:
    """Estimate all layouts that fit, and return them with the fastest first.

    Args:
        given: flags of the command line, whose values in `args` are kept.
    """
    found = []
    for layout in _layouts(args, gpus, given):
        if does_not_divide(layout, request.student) is not None:
            continue
        # Memory first: the simulation is much slower.
        if request.fits(memory_of_stages(request, layout, "aligned-stage")):
            found.append(estimate(request, layout))
    return sorted((each for each in found if each.fits), key=lambda each: each.best_seconds)


def _layouts(args: argparse.Namespace, gpus: int, given: Collection[str]) -> Iterator[Layout]:
    tried = [
        (getattr(args, name),) if flag(name) in given else values for name, values in _TRIED.items()
    ]
    for (tp, pp, vpp, b), recompute in itertools.product(itertools.product(*tried), _RECOMPUTE):
        cp = args.context_parallel_size
        dp, left = divmod(gpus, tp * pp * cp)
        if left or dp == 0 or args.global_batch_size % (b * dp):
            continue
        n = args.global_batch_size // (b * dp)
        ep, etp = args.expert_model_parallel_size, args.expert_tensor_parallel_size
        yield Layout(tp, pp, cp, dp, vpp, b, n, recompute, ep=ep, etp=etp)


def does_not_divide(layout: Layout, student: TransformerSize) -> str | None:
    """Return a sentence about the first size that does not divide; None if all do."""
    tp, groups = layout.tp, student.num_kv_heads
    if student.num_layers % (layout.pp * layout.num_chunks):
        over = f"--pipeline-model-parallel-size: PP {layout.pp} x {layout.num_chunks} chunks"
        return f"{student.num_layers} layers do not divide over {over}."
    for count, name in (
        (student.num_heads, "attention heads"),
        # Megatron replicates query groups if there are fewer groups than ranks.
        (0 if tp % groups == 0 else groups, "query groups"),
        (student.ffn_hidden_size, "MLP units (--ffn-hidden-size)"),
    ):
        if count % tp:
            return f"{count} {name} do not divide over --tensor-model-parallel-size: TP {tp}."
    if problem := _experts_do_not_divide(layout, student.experts):
        return problem
    if layout.num_chunks > 1 and (layout.pp == 1 or layout.num_microbatches % layout.pp):
        return (
            f"{layout.num_microbatches} microbatches do not divide over PP {layout.pp}, which"
            " several chunks per stage require."
        )
    return None


def _experts_do_not_divide(layout: Layout, experts: Experts | None) -> str | None:
    if experts is None:
        return None
    ep, etp = layout.ep, layout.expert_tp
    ranks = layout.tp * layout.cp * layout.dp
    split = f"--expert-tensor-parallel-size {etp}"
    for count, name, over in (
        (experts.num_experts, "experts do not divide over --expert-model-parallel-size", ep),
        (ranks, f"ranks of a stage do not divide over {split} x EP {ep} =", ep * etp),
        (experts.ffn_hidden_size, f"units of an expert do not divide over {split}:", etp),
    ):
        if count % over:
            return f"{count} {name} {over}."
    if layout.tp > 1 and not layout.sequence_parallel:
        return f"experts under TP {layout.tp} need --sequence-parallel."
    return None
