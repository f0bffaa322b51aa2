"""The losses of a causal language model, with graphs that can be differentiated twice."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_let.errors import LETError
from megatron_let.losses.interpolation import Interpolation, check_shapes
from megatron_let.teacher.model import layer_list


@dataclass(frozen=True)
class ModelLosses:
    """Losses of a model, and the parameters that they are differentiated by.

    Attributes:
        nll: mean loss per token, 0-dim.
        alignment: loss at layer k, by k in increasing order.
        parameters: of each layer (0-based), and of everything else under None.
    """

    nll: Tensor
    alignment: dict[int, Tensor]
    parameters: dict[int | None, list[Tensor]]


def alignment_loss(hidden: Tensor, teacher: Tensor) -> Tensor:
    """Return the token mean of equation 7, differentiable twice; 0-dim.

    Args:
        hidden: student's state, `[..., d_M]`.
        teacher: `[..., d_T]`, a constant.
    """
    check_shapes(hidden, teacher)
    interpolated = Interpolation(hidden, teacher).apply(hidden)
    return -F.cosine_similarity(interpolated, teacher, dim=-1).mean()


def model_losses(model: Any, state: Tensor, tokens: Tensor, layers: Sequence[int]) -> ModelLosses:
    """Run a causal language model of transformers once in evaluation mode; compute its losses.

    Args:
        state: teacher's state, `[b, s, d_T]`.
        tokens: `[b, s + 1]`.
        layers: k, 1-based.

    Raises:
        LETError: the model has fewer layers.
    """
    num_layers = model.config.get_text_config(decoder=True).num_hidden_layers
    for k in layers:
        if not 1 <= k <= num_layers:
            raise LETError(
                f"--layers has {k} but the model has {num_layers} layers; give numbers from 1 to"
                f" {num_layers}."
            )
    blocks, hidden = layer_list(model, num_layers), {}

    def keep(k: int, layer: torch.nn.Module, inputs: Any, output: Any) -> None:
        hidden[k] = output[0] if isinstance(output, tuple) else output

    handles = [blocks[k - 1].register_forward_hook(partial(keep, k)) for k in layers]
    # The fused kernels of attention have no second derivative.
    with sdpa_kernel(SDPBackend.MATH):
        logits = model(tokens[:, :-1], use_cache=False).logits
    for handle in handles:
        handle.remove()
    parameters: dict[int | None, list[Tensor]] = dict(
        enumerate(list(block.parameters()) for block in blocks)
    )
    in_layers = {id(p) for of_layer in parameters.values() for p in of_layer}
    parameters[None] = [p for p in model.parameters() if id(p) not in in_layers]
    nll = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    alignment = {k: alignment_loss(hidden[k], state) for k in sorted(layers)}
    return ModelLosses(nll, alignment, parameters)
