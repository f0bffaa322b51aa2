"""Refuse Megatron arguments that nothing in a run honours.

`megatron_arguments.yaml` lists every argument of the tested Megatron by who honours it.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterable
from importlib.resources import files

import yaml

from megatron_let.config.validation import check_hybrid
from megatron_let.errors import LETError

# Set by this entry, which gives the model the factor of --rope-scaling-factor. Other scripts, and
# earlier versions, trained with 8.
APPLIES_ROPE_FACTOR = "applies_rope_scaling_factor"

# Argument without effect -> the flag that has the effect.
_INSTEAD = {
    "rampup_batch_size": "--step-batch-size-schedule, whose thresholds are tokens",
    "use_flash_attn": "--attention-backend flash",
}
# Megatron's latent attention has a rotary embedding and projections of its own.
_IGNORED_BY_LATENT_ATTENTION = (
    "use_rope_scaling",
    "rotary_seq_len_interpolation_factor",
    "attention_output_gate",
)
_NO_TRANSFORMER_ENGINE = "needs Transformer Engine, which is not installed; drop it or install it"
_NO_GPU = "needs a GPU; drop it"
_CUSTOM_SCRIPT = (
    "is not supported by this entry; use it in a custom training script with the three lines of"
    " megatron_let.integration"
)
_NO_MAMBA = "has no effect without a Mamba entry (M) in --hybrid-layer-pattern; drop it"
_RUNS_CODE = (
    "is refused, because code in a folder is never run; give a tokenizer that transformers supports"
)
_UNKNOWN = "is not known to this version of megatron_let, which may ignore it; drop it"


@functools.cache
def read_lists() -> dict[str, frozenset[str]]:
    """Return {name of the list: arguments} of `megatron_arguments.yaml`."""
    text = files(__package__).joinpath("megatron_arguments.yaml").read_text(encoding="utf-8")
    return {name: frozenset(words.split()) for name, words in yaml.safe_load(text).items()}


def check_known(
    args: argparse.Namespace, actions: Iterable[argparse.Action], cuda: bool = True
) -> None:
    """Check that each argument that differs from its default is honoured.

    Args:
        args: the parsed arguments, before Megatron's validation, which derives others.
        actions: those of Megatron's parser, which give the defaults and the flags.

    Raises:
        LETError: names the flag and why it is refused.
    """
    lists = read_lists()
    problems = {name: _no_effect(name) for name in lists["no_effect"]}
    problems |= dict.fromkeys(lists["custom_script"], _CUSTOM_SCRIPT)
    problems |= dict.fromkeys(lists["runs_code"], _RUNS_CODE)
    if "M" not in (args.hybrid_layer_pattern or ""):
        problems |= dict.fromkeys(lists["mamba"], _NO_MAMBA)
    if not cuda:
        problems |= dict.fromkeys(lists["gpu"], _NO_GPU)
        if not args.use_pytorch_profiler:
            problems["profile"] = f"{_NO_GPU}, or add --use-pytorch-profiler"
    known = frozenset().union(*lists.values())
    actions = list(actions)
    problems |= {a.dest: _UNKNOWN for a in actions if a.dest not in known and a.dest != "help"}
    _refuse(args, actions, problems)
    check_layers(args, actions)


def check_layers(args: argparse.Namespace, actions: Iterable[argparse.Action]) -> None:
    """Check that the layers of this host honour the model's arguments.

    Args:
        args: the arguments, parsed or taken from a checkpoint.

    Raises:
        LETError: there is no Transformer Engine, and an argument needs it; or the heads cannot be
            grouped.
    """
    heads = args.num_attention_heads
    if args.group_query_attention and heads and heads % args.num_query_groups:
        raise LETError(
            f"--num-attention-heads {heads} is not a multiple of"
            f" --num-query-groups {args.num_query_groups}; change one of them."
        )
    if args.multi_latent_attention:
        reason = "has no effect with --multi-latent-attention; drop it"
        _refuse(args, actions, dict.fromkeys(_IGNORED_BY_LATENT_ATTENTION, reason))
    _check_layout(args)
    if args.transformer_impl == "local":
        names = read_lists()["transformer_engine"]
        _refuse(args, actions, dict.fromkeys(names, _NO_TRANSFORMER_ENGINE))
    check_hybrid(args)


def _check_layout(args: argparse.Namespace) -> None:
    """Check for layouts in which the layers fail, or are wrong, after the run is set up."""
    if args.mtp_num_layers and args.pipeline_model_parallel_layout:
        raise LETError(
            f"--mtp-num-layers {args.mtp_num_layers} cannot be used with"
            " --pipeline-model-parallel-layout, which may move these layers to a stage without"
            " data; drop one of them."
        )
    tp = args.tensor_model_parallel_size
    kind = "--num-experts" if args.num_experts else "--multi-latent-attention"
    if (args.num_experts or args.multi_latent_attention) and tp > 1 and not args.sequence_parallel:
        raise LETError(
            f"{kind} with --tensor-model-parallel-size {tp} gives wrong gradients, or none, without"
            " sequence parallelism; add --sequence-parallel."
        )
    experts_tp = args.expert_tensor_parallel_size or tp
    uneven = args.num_experts and args.moe_token_dispatcher_type == "alltoall" and experts_tp > 1
    if uneven and args.distributed_backend == "gloo":
        raise LETError(
            f"--moe-token-dispatcher-type alltoall with --expert-tensor-parallel-size {experts_tp}"
            " gathers tensors of different sizes, which gloo cannot; give"
            " --expert-tensor-parallel-size 1, or --moe-token-dispatcher-type allgather."
        )


def _refuse(
    args: argparse.Namespace, actions: Iterable[argparse.Action], problems: dict[str, str]
) -> None:
    # Of several flags of one argument, argparse takes the default of the first.
    by_name = {action.dest: action for action in reversed(list(actions))}
    for name, action in by_name.items():
        value = getattr(args, name, action.default)
        if name in problems and value != action.default:
            raise LETError(f"{as_written(action, value)} {problems[name]}.")


def _no_effect(name: str) -> str:
    remedy = f"use {_INSTEAD[name]}" if name in _INSTEAD else "drop it"
    return f"has no effect in pretraining; {remedy}"


def as_written(action: argparse.Action, value: object) -> str:
    """Return the flag as a user writes it, with its value if it takes one."""
    option = max(action.option_strings, key=len, default=action.dest)
    if action.nargs == 0:
        return option
    texts = value if isinstance(value, list | tuple) else [value]
    return " ".join([option, *(str(getattr(text, "name", text)) for text in texts)])
