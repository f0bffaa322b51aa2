"""Entry point: `torchrun ... -m megatron_let.pretrain --config configs/X.yaml [any flag]`."""

import argparse
import os
import sys

from megatron_let.compat.device import (
    Host,
    detect_host,
    prepare_process,
    set_hardware_queues,
)
from megatron_let.errors import (
    LETError,
    may_succeed_on_restart,
    print_error,
    refusal_by_another_package,
)
from megatron_let.run import restarts_in_job

USAGE_ERROR = 2
# A launcher starts the run again after this code.
MACHINE_ERROR = 1


def main(argv: list[str] | None = None) -> int:
    """Run one pretraining and return its exit code.

    Args:
        argv: arguments after the program's name; None takes them from the command line.
    """
    try:
        return _run(sys.argv[1:] if argv is None else argv)
    except SystemExit as ending:
        restarts_in_job.end_job_after(ending.code)
        raise


def _run(argv: list[str]) -> int:
    """Train, and return 0; 2 after printing why the run cannot start, or 1 if it may later."""
    host = detect_host()
    # Before any import of Megatron, which reads the environment when it is imported.
    prepare_process(host, int(os.environ.get("RANK", "0")))
    try:
        train(argv, host)
    except LETError as error:
        print_error(error)
        restarts_in_job.end_job("a setting is invalid")
        return USAGE_ERROR
    except Exception as error:
        refusal = refusal_by_another_package(error)
        if refusal is None:
            raise
        print_error(refusal)
        return MACHINE_ERROR if may_succeed_on_restart(error) else USAGE_ERROR
    return 0


def train(argv: list[str], host: Host) -> None:
    """Parse the configuration, build what the run needs, and train.

    Raises:
        LETError: the run cannot be started, or the teacher failed in a step.
    """
    from megatron.core.enums import ModelType
    from megatron.training import get_tokenizer, pretrain, print_rank_0
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.global_vars import get_tensorboard_writer

    from megatron_let import integration
    from megatron_let.checkpoint.load_check import check_loaded
    from megatron_let.compat import PatchSet, changed_schedule
    from megatron_let.compat.apply import apply_host_patches
    from megatron_let.compat.local_hybrid import local_hybrid_spec
    from megatron_let.compat.local_layers import check_local_layers, use_local_layers
    from megatron_let.config.arguments import let_config_from_args
    from megatron_let.config.command_line import parse_command_line
    from megatron_let.data.fingerprint import check_data_tokenizer
    from megatron_let.data.gpt import check_data, check_token_ids, datasets_provider
    from megatron_let.engines import load_engine
    from megatron_let.methods.forward_step import make_forward_step
    from megatron_let.run import artifacts, control_files, unsaved
    from megatron_let.run.output_folder import claim

    # Configuration
    host_patches = apply_host_patches(host)
    args = parse_command_line(argv, host.argv(), prepare_arguments, host.cuda, report_once)
    config = let_config_from_args(args)
    print_rank_0(f"megatron_let: {host.describe()}; {host_patches.describe()}")
    if args.transformer_impl == "local":
        check_local_layers(args)
    check_data(args)
    check_data_tokenizer(args, get_tokenizer())
    check_loaded(args, get_tokenizer())

    # Build
    make_model = load_engine(args.engine).enable(args, host.cuda)
    integration.enable_on_engine(args, config)
    # After the comparison with the teacher's tokenizer, which knows more.
    check_token_ids(args, get_tokenizer().vocab_size)
    if args.override_opt_param_scheduler:
        PatchSet().apply_all(changed_schedule.wrappers())
    for of_run in (control_files, unsaved, artifacts, restarts_in_job):
        PatchSet().apply_all(of_run.wrappers(args))
    token_aligner = integration.token_aligner(args, config)
    if args.rank == 0:
        claim(args, config)
    model = make_model(args)
    if args.transformer_impl == "local" and args.hybrid_layer_pattern is None:
        use_local_layers(model)
    elif args.transformer_impl == "local":
        model.hybrid_stack_spec = local_hybrid_spec(model.transformer)

    # Train
    pretrain(
        pretrain_cfg_container_from_args(args, model),
        datasets_provider(args, token_aligner),
        ModelType.encoder_or_decoder,
        make_forward_step(args),
    )
    writer = get_tensorboard_writer()
    if writer is not None:
        # Megatron's last evaluation is logged after its own flush, and would be lost at exit.
        writer.flush()
    if args.rank == 0:
        control_files.mark_done(args)


def report_once(message: str) -> None:
    """Print a sentence on the first rank, before torch.distributed is initialised."""
    if os.environ.get("RANK", "0") == "0":
        print(f"megatron_let: {message}", flush=True)


def prepare_arguments(args: argparse.Namespace) -> None:
    """Check that LET and the engine support every flag; locate teacher and tokenizer.

    Also sets the environment that CUDA reads when it starts.

    Raises:
        LETError: names the flag and what to do.
    """
    from megatron_let.config.megatron_arguments import APPLIES_ROPE_FACTOR
    from megatron_let.config.run_settings import complete_run_settings
    from megatron_let.config.validation import check_document_mask, check_supported
    from megatron_let.engines import load_engine
    from megatron_let.run.output_folder import pin_hub_ids, resolve_teacher_dtype
    from megatron_let.run.resume import check_loads_something
    from megatron_let.teacher.hub import download_model, parse_hub_id
    from megatron_let.teacher.inspect import resolve_teacher

    set_hardware_queues(args)
    setattr(args, APPLIES_ROPE_FACTOR, True)
    check_supported(args)
    check_document_mask(args)
    complete_run_settings(args, report_once)
    check_loads_something(args)
    restarts_in_job.check_arguments(args)
    load_engine(args.engine).check_arguments(args)
    pin_hub_ids(args)
    if choice := resolve_teacher_dtype(args):
        report_once(choice)
    # Megatron's tokenizer loads neither a revision of a hub id nor a .gguf file.
    if args.tokenizer_model in args.let_hub_ids.values():
        hub_id = parse_hub_id(args.tokenizer_model)
        assert hub_id is not None
        args.tokenizer_model = str(download_model(*hub_id, weights=False))
    elif args.let_teacher is not None and args.tokenizer_model == str(args.let_teacher):
        args.tokenizer_model = str(resolve_teacher(args.let_teacher))


if __name__ == "__main__":
    sys.exit(main())
