"""The teacher with its output layer, of which a rank keeps its own part of the vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from megatron_let.config.let_config import LETConfig
from megatron_let.errors import LETError
from megatron_let.teacher.inspect import TeacherFolder
from megatron_let.teacher.model import PROBE_TOKENS, Teacher, load_model


@dataclass(frozen=True)
class OutputLayer:
    """Rows of the teacher's output layer.

    Attributes:
        weight: `[rows, d_T]`.
        bias: `[rows]`, or None.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[..., d_T]` -> logits `[..., rows]`."""
        return F.linear(hidden, self.weight, self.bias)

    def rows(self, start: int, stop: int) -> OutputLayer:
        """Those of the token ids from `start` to `stop`, as views."""
        return OutputLayer(
            self.weight[start:stop], None if self.bias is None else self.bias[start:stop]
        )

    def copy_to(self, device: torch.device) -> OutputLayer:
        """A copy on a device, which keeps nothing of a larger layer in memory."""
        weight, bias = (
            None if tensor is None else tensor.to(device, copy=True)
            for tensor in (self.weight, self.bias)
        )
        assert weight is not None
        return OutputLayer(weight, bias)


def load_teacher_with_head(
    folder: TeacherFolder, config: LETConfig, device: torch.device, vocabulary: range
) -> tuple[Teacher, OutputLayer]:
    """Load the teacher that `config` names, and these rows of its output layer.

    Args:
        vocabulary: token ids of this rank; those beyond the teacher's have no row.

    Raises:
        LETError: the weights are of another model, or its logits are no linear map of its state.
    """
    model: Any = load_model(folder, config, device, AutoModelForCausalLM)
    head = _output_layer(model)
    _check_linear(model, head, folder)
    tied = head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    base = model.base_model.to(device)
    teacher = Teacher(base, folder.num_layers, folder.num_layers, final_norm=True)
    head = _output_layer(model).rows(vocabulary.start, vocabulary.stop)
    return teacher, head if tied else head.copy_to(device)


def _output_layer(model: PreTrainedModel) -> OutputLayer:
    layer: Any = model.get_output_embeddings()
    bias = getattr(layer, "bias", None)
    return OutputLayer(layer.weight.detach(), None if bias is None else bias.detach())


@torch.no_grad()
def _check_linear(model: Any, head: OutputLayer, folder: TeacherFolder) -> None:
    """Refuse a model that scales or caps its logits: the chunks would not be its own."""
    tokens = torch.arange(PROBE_TOKENS, device=head.weight.device)[None]
    model.eval()
    expected = model(input_ids=tokens, use_cache=False).logits
    found = head(model.base_model(input_ids=tokens, use_cache=False).last_hidden_state)
    # NaN is equal to nothing; the first step will say that the teacher gave it.
    if expected.isfinite().all() and not torch.allclose(
        expected.float(), found.float(), atol=1e-2, rtol=1e-2
    ):
        raise LETError(
            f"The teacher {folder.path} scales or caps its logits after the output layer, which"
            " rkd and salt do not; use another teacher, or --let-method let."
        )
