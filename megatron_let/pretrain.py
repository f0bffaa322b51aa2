"""The entry: `torchrun ... -m megatron_let.pretrain --config configs/X.yaml [any flag]`."""

from __future__ import annotations

import argparse
import functools
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_let.compat.device import Host, detect_host, prepare_process
from megatron_let.errors import LETError

USAGE_ERROR = 2


def main(argv: list[str] | None = None) -> int:
    """Run one pretraining; return the exit code.

    Args:
        argv: arguments after the program's name; None takes them from the command line.
    """
    rank = int(os.environ.get("RANK", "0"))
    host = detect_host()
    # Before any module of Megatron, which looks at the environment when it is imported.
    prepare_process(host, rank)
    from megatron_let.compat import PatchError
    from megatron_let.config.recipes import RecipeError

    try:
        _run(sys.argv[1:] if argv is None else argv, host)
    except (LETError, RecipeError, PatchError) as error:
        if _speaks(error, rank):
            print(f"megatron_let: error (rank {rank}): {error}", file=sys.stderr, flush=True)
        return USAGE_ERROR
    return 0


def _speaks(error: Exception, rank: int) -> bool:
    """Whether this rank prints an error: once a node at the start, where all ranks meet it."""
    if torch.distributed.is_initialized():
        return rank == 0 or not getattr(error, "collective", False)
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _run(argv: list[str], host: Host) -> None:
    from megatron.core.enums import ModelType
    from megatron.training import get_tokenizer, pretrain, print_rank_0
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    from megatron_let import integration
    from megatron_let.checkpoint.loaded import check_loaded
    from megatron_let.compat.apply import apply_host_patches
    from megatron_let.compat.local_layers import check_local_layers, local_layer_spec
    from megatron_let.config.arguments import let_config_from_args
    from megatron_let.data.fingerprint import check_data_tokenizer
    from megatron_let.data.gpt import check_data, datasets_provider
    from megatron_let.methods.forward_step import make_forward_step
    from megatron_let.run import artifacts as artifact_log
    from megatron_let.run import control_files as control
    from megatron_let.run.output_folder import claim

    host_patches = apply_host_patches(host)
    sys.argv = [sys.argv[0], *host.argv(), *_expand_recipe(argv)]
    args = parse_and_validate_args(extra_args_provider=_add_arguments)
    print_rank_0(f"megatron_let: {host.describe()}; {host_patches.describe()}")
    if args.transformer_impl == "local":
        check_local_layers(args)
    check_data(args)
    check_data_tokenizer(args, get_tokenizer())
    check_loaded(args, get_tokenizer())
    make_model = _enable_engine(args, host)
    integration.enable(args)
    control.enable(args)
    artifact_log.enable(args)
    if args.rank == 0:
        claim(args, let_config_from_args(args))
    model = make_model(args)
    if args.transformer_impl == "local":
        model.transformer_layer_spec = local_layer_spec
    pretrain(
        pretrain_cfg_container_from_args(args, model),
        datasets_provider(args, integration.realigner(args)),
        ModelType.encoder_or_decoder,
        make_forward_step(args),
    )
    if args.rank == 0:
        control.mark_done(args)


def _enable_engine(args: argparse.Namespace, host: Host) -> Callable[[argparse.Namespace], Any]:
    """Prepare what takes the steps; return the function from arguments to the model's config."""
    if args.engine == "megatron":
        from megatron.training.argument_utils import gpt_config_from_args

        from megatron_let.config.arguments import resumed_step
        from megatron_let.engines.deepspeed.checkpoint_info import refuse_deepspeeds
        from megatron_let.files.names import checkpoint_name

        if args.load is not None:
            refuse_deepspeeds(Path(args.load) / checkpoint_name(resumed_step(args)))
        return gpt_config_from_args
    from megatron_let.engines.deepspeed import launch

    _, config = launch.enable(args, host.cuda)
    return functools.partial(launch.model_config, config=config)


def _add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    from megatron_let.config.arguments import add_arguments

    return add_arguments(parser)


def _expand_recipe(argv: list[str]) -> list[str]:
    """Replace `--config FILE` by the recipe's arguments."""
    from megatron.training.arguments import add_megatron_arguments

    from megatron_let.config.recipes import load_recipe, recipe_argv
    from megatron_let.config.validation import check_entry_supports, check_supported
    from megatron_let.engines.deepspeed import refusals
    from megatron_let.teacher.inspect import resolve_teacher

    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--config", type=Path)
    known, rest = own.parse_known_args(argv)
    parser = _add_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
    if known.config is not None:
        rest = recipe_argv(load_recipe(known.config), parser, rest)
    _escape_percent_signs(parser)
    # Before Megatron's own validation, whose assertions would speak of other flags.
    args = parser.parse_args(rest)
    if args.let_method not in (None, "none"):
        check_supported(args)
    check_entry_supports(args)
    if args.engine == "deepspeed":
        refusals.check_supported(args)
    if args.let_teacher is not None and args.tokenizer_model == str(args.let_teacher):
        # Megatron's tokenizer takes neither a .gguf file nor a revision.
        rest = [*rest, "--tokenizer-model", str(resolve_teacher(args.let_teacher))]
    return rest


def _escape_percent_signs(parser: argparse.ArgumentParser) -> None:
    # 0.19.2 has a bare "10%)" in a help text, on which argparse's --help fails.
    for action in parser._actions:
        if action.help and action.help != argparse.SUPPRESS:
            action.help = re.sub(r"%%|%\(\w+\)\w|%", _escape_bare, action.help)


def _escape_bare(match: re.Match[str]) -> str:
    return "%%" if match[0] == "%" else match[0]


if __name__ == "__main__":
    sys.exit(main())
