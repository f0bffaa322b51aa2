"""Entry point: `torchrun ... -m megatron_let.pretrain --config configs/X.yaml [any flag]`."""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_let.compat.device import Host, detect_host, prepare_process
from megatron_let.errors import LETError, print_error

USAGE_ERROR = 2


def main(argv: list[str] | None = None) -> int:
    """Run one pretraining and return its exit code.

    Args:
        argv: arguments after the program's name; None takes them from the command line.
    """
    host = detect_host()
    # Before any import of Megatron, which reads the environment when it is imported.
    prepare_process(host, int(os.environ.get("RANK", "0")))
    try:
        train(sys.argv[1:] if argv is None else argv, host)
    except LETError as error:
        print_error(error)
        return USAGE_ERROR
    return 0


def train(argv: list[str], host: Host) -> None:
    """Parse the configuration, build what the run needs, and train.

    Raises:
        LETError: the run cannot be started, or the teacher failed in a step.
    """
    from megatron.core.enums import ModelType
    from megatron.training import get_tokenizer, pretrain, print_rank_0
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    from megatron_let import integration
    from megatron_let.checkpoint.loaded import check_loaded
    from megatron_let.compat import PatchSet
    from megatron_let.compat.apply import apply_host_patches
    from megatron_let.compat.local_layers import check_local_layers, local_layer_spec
    from megatron_let.config.arguments import let_config_from_args
    from megatron_let.config.command_line import parse_command_line
    from megatron_let.data.fingerprint import check_data_tokenizer
    from megatron_let.data.gpt import check_data, datasets_provider
    from megatron_let.methods.forward_step import make_forward_step
    from megatron_let.run import artifacts, control_files
    from megatron_let.run.output_folder import claim

    # Configuration
    host_patches = apply_host_patches(host)
    args = parse_command_line(argv, host.argv(), check_flags)
    config = let_config_from_args(args)
    print_rank_0(f"megatron_let: {host.describe()}; {host_patches.describe()}")
    if args.transformer_impl == "local":
        check_local_layers(args)
    check_data(args)
    check_data_tokenizer(args, get_tokenizer())
    check_loaded(args, get_tokenizer())

    # Build
    make_model = _enable_engine(args, host)
    integration.enable(args, config)
    PatchSet().apply_all(control_files.wrappers(args) | artifacts.wrappers(args))
    token_aligner = integration.token_aligner(args, config)
    if args.rank == 0:
        claim(args, config)
    model = make_model(args)
    if args.transformer_impl == "local":
        model.transformer_layer_spec = local_layer_spec

    # Train
    pretrain(
        pretrain_cfg_container_from_args(args, model),
        datasets_provider(args, token_aligner),
        ModelType.encoder_or_decoder,
        make_forward_step(args),
    )
    if args.rank == 0:
        control_files.mark_done(args)


def check_flags(args: argparse.Namespace) -> None:
    """Check that LET, this entry and the engine support every flag.

    Raises:
        LETError: names the flag and what to do.
    """
    from megatron_let.config.validation import check_entry_supports, check_supported
    from megatron_let.engines.deepspeed import refusals

    check_supported(args)
    check_entry_supports(args)
    if args.engine == "deepspeed":
        refusals.check_supported(args)


def _enable_engine(args: argparse.Namespace, host: Host) -> Callable[[argparse.Namespace], Any]:
    """Prepare what takes the steps; return the function from arguments to the model's config."""
    if args.engine == "megatron":
        from megatron.training.argument_utils import gpt_config_from_args

        from megatron_let.engines.deepspeed.checkpoint_info import refuse_deepspeeds
        from megatron_let.files.names import checkpoint_name
        from megatron_let.run.resume import resumed_step

        if args.load is not None:
            refuse_deepspeeds(Path(args.load) / checkpoint_name(resumed_step(args)))
        return gpt_config_from_args
    from megatron_let.engines.deepspeed import launch

    _, config = launch.enable(args, host.cuda)
    return functools.partial(launch.model_config, config=config)


if __name__ == "__main__":
    sys.exit(main())
