"""Check a teacher against the student, its data and its vocabulary size."""

from __future__ import annotations

import argparse
import warnings

from megatron_let.config.arguments import num_steps, num_student_layers
from megatron_let.config.let_config import LETConfig
from megatron_let.errors import LETError
from megatron_let.losses import CCA_TOKENS_PER_FEATURE
from megatron_let.teacher.inspect import TeacherFolder
from megatron_let.teacher.model import tapped_layer


def check_fits(config: LETConfig, folder: TeacherFolder, args: argparse.Namespace) -> None:
    """Check the teacher and the aligned layers against the student and its data.

    Raises:
        LETError: names both sizes.
    """
    if config.traits.learns_from == "states":
        _check_layers(config, folder, args)
    # Under its own tokenizer the teacher's sequence is cut to its positions.
    limit = None if config.aligns_tokens else folder.max_positions
    if limit is not None and args.seq_length > limit:
        raise LETError(
            f"--seq-length is {args.seq_length} but the teacher was built for "
            f"{folder.max_positions} positions; shorten the sequence or use another teacher."
        )
    steps = num_steps(args)
    if config.traits.ends_at_stop_step and config.stop_step > steps:
        warnings.warn(
            f"--let-stop-step {config.stop_step} is beyond the run's {steps} steps:"
            " the weight never reaches 0 and the teacher is kept to the end.",
            stacklevel=2,
        )


def _check_layers(config: LETConfig, folder: TeacherFolder, args: argparse.Namespace) -> None:
    num_layers = num_student_layers(args)
    if config.layer > num_layers:
        raise LETError(
            f"--let-layer is {config.layer} but the student has {num_layers} layers; give a"
            f" number from 1 to {num_layers}."
        )
    tapped_layer(config.teacher_layer, folder.num_layers)
    tokens = args.micro_batch_size * args.seq_length
    needed = CCA_TOKENS_PER_FEATURE * folder.hidden_size
    if config.loss == "cca" and tokens < needed:
        raise LETError(
            f"--let-loss cca correlates the teacher's {folder.hidden_size} features over the"
            f" {tokens} tokens of a microbatch, too few for a meaningful correlation; raise"
            f" --micro-batch-size to at least {-(-needed // args.seq_length)}, or use another"
            " --let-loss."
        )


def check_vocabulary_size(folder: TeacherFolder, vocab_size: int) -> None:
    """Check that the teacher's embedding has a row for each of the student's tokens.

    Raises:
        LETError: names both sizes.
    """
    if vocab_size > folder.vocab_size:
        raise LETError(
            f"The student's tokenizer has {vocab_size} tokens but the teacher's embedding has "
            f"{folder.vocab_size}; train the student on the teacher's tokenizer."
        )
