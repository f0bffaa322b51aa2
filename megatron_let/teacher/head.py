"""The teacher with its output layer, sharded over the vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from megatron_let.config.let_config import LETConfig
from megatron_let.errors import LETError
from megatron_let.teacher.broadcast import load_on_first_rank
from megatron_let.teacher.documents import Documents
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
        """Return logits `[..., rows]` of hidden states `[..., d_T]`."""
        return F.linear(hidden, self.weight, self.bias)

    def rows(self, start: int, stop: int) -> OutputLayer:
        """Return views of the rows of token ids `start` to `stop`."""
        return OutputLayer(
            self.weight[start:stop], None if self.bias is None else self.bias[start:stop]
        )

    def copy_to(self, device: torch.device) -> OutputLayer:
        """Return a copy on a device; it does not keep the storage of a larger layer."""
        bias = None if self.bias is None else self.bias.to(device, copy=True)
        return OutputLayer(self.weight.to(device, copy=True), bias)


def load_teacher_with_head(
    folder: TeacherFolder,
    config: LETConfig,
    device: torch.device,
    vocabulary: range,
    documents: Documents | None = None,
    group: torch.distributed.ProcessGroup | None = None,
) -> tuple[Teacher, OutputLayer]:
    """Load a teacher and a shard of its output layer.

    Args:
        config: precision of the teacher.
        vocabulary: token ids of this rank; ids beyond the teacher's vocabulary have no row.
        documents: borders within a row; None if a row is one sequence.
        group: ranks that load the teacher together, of which the first reads the files; None for
            this rank alone.

    Raises:
        LETError: weights are missing, the model cannot be used with `documents`, or the logits are
            not a linear map of the last hidden state.
    """

    def load() -> PreTrainedModel:
        model = load_model(folder, config, device, AutoModelForCausalLM)
        _check_linear(model, _output_layer(model), folder)
        return model

    model = load_on_first_rank(load, device, group)
    layer = _output_layer(model)
    tied = layer.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    teacher = Teacher(model.base_model, folder.num_layers, folder.num_layers, True, documents)
    head = layer.rows(vocabulary.start, vocabulary.stop)
    return teacher, head if tied else head.copy_to(device)


def _output_layer(model: PreTrainedModel) -> OutputLayer:
    layer: Any = model.get_output_embeddings()
    bias = getattr(layer, "bias", None)
    return OutputLayer(layer.weight.detach(), None if bias is None else bias.detach())


@torch.no_grad()
def _check_linear(model: Any, head: OutputLayer, folder: TeacherFolder) -> None:
    """Raise LETError if the model scales or caps the logits after its output layer.

    Small random logits pass a cap almost unchanged: a second run gives large ones to what follows.
    """
    tokens = torch.arange(PROBE_TOKENS, device=head.weight.device)[None]
    model.eval()
    expected = model(input_ids=tokens, use_cache=False).logits
    found = head(model.base_model(input_ids=tokens, use_cache=False).last_hidden_state)
    # NaN compares unequal to itself; the first training step reports it with a clear message.
    same = torch.allclose(expected.float(), found.float(), atol=1e-2, rtol=1e-2)
    if expected.isfinite().all() and not (same and _is_identity_after_head(model, expected)):
        raise LETError(
            f"The teacher {folder.path} scales or caps its logits after the output layer, which"
            " rkd and salt do not; use another teacher, or --let-method let."
        )


def _is_identity_after_head(model: Any, logits: torch.Tensor) -> bool:
    """Return whether the model returns what its output layer returns, whatever its size."""
    large = torch.linspace(-1000, 1000, logits.numel(), dtype=logits.dtype, device=logits.device)
    large = large.view_as(logits)
    hook = model.get_output_embeddings().register_forward_hook(lambda *_: large)
    try:
        tokens = torch.arange(PROBE_TOKENS, device=logits.device)[None]
        found = model(input_ids=tokens, use_cache=False).logits
    finally:
        hook.remove()
    return torch.allclose(found.to(large.dtype), large)
