"""The forward step that `pretrain()` calls: the student's forward and loss on one microbatch."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.utils import get_attr_wrapped_model

from megatron_let.data.gpt import get_batch
from megatron_let.metrics.write import LOSS_KEY

# The rerun state machine reports a loss this many times the largest one so far.
_SPIKY_LOSS_FACTOR = 10


def make_forward_step(args: argparse.Namespace) -> Callable[..., Any]:
    """Return Megatron's `forward_step_func` for these arguments."""

    def forward_step(data_iterator: Any, model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        samples = args.micro_batch_size if model.training else args.eval_micro_batch_size
        stage = get_attr_wrapped_model(model, "vp_stage")
        batch = get_batch(data_iterator, args, stage, samples)
        output = model(
            batch["tokens"],
            batch["position_ids"],
            batch["attention_mask"],
            labels=batch["labels"],
            loss_mask=batch["loss_mask"],
        )
        return output, partial(_loss, args, batch["loss_mask"])

    return forward_step


def _loss(
    args: argparse.Namespace, loss_mask: torch.Tensor | None, output: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Return the sum of token losses, the unmasked tokens and the reported values; equation 1.

    Args:
        loss_mask, output: [b, s / cp] weights and token losses; called on the last stage only.
    """
    assert loss_mask is not None, "the last stage has a loss mask"
    mask = loss_mask.view(-1).float()
    loss = torch.sum(output.view(-1).float() * mask)
    num_tokens = mask.sum().detach().to(torch.int)
    _validate(args, loss)
    return loss, num_tokens, {LOSS_KEY: torch.stack([loss.detach(), num_tokens.float()])}


def _validate(args: argparse.Namespace, loss: torch.Tensor) -> None:
    machine = get_rerun_state_machine()
    checks = []
    if args.check_for_nan_in_loss_and_grad:
        checks += [(torch.isnan, "NaN in the local loss", True)]
        checks += [(torch.isinf, "Inf in the local loss", True)]
    if args.check_for_spiky_loss:
        spiky = partial(machine.is_unexpectedly_large, threshold=_SPIKY_LOSS_FACTOR, context="loss")
        checks += [(spiky, "spiky loss", False)]
    for rejected, message, fatal in checks:
        machine.validate_result(
            result=loss, rejection_func=rejected, message=message, tolerance=0.0, fatal=fatal
        )
