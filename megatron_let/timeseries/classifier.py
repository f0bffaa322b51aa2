"""The student: a causal language model whose input is a time series instead of tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_let.errors import LETError
from megatron_let.evaluation.models import ModelFolder, load_model
from megatron_let.teacher.hub import parse_hub_id
from megatron_let.teacher.inspect import TeacherFolder, inspect_teacher
from megatron_let.teacher.model import layer_list
from megatron_let.timeseries.series import DataSet, Series
from megatron_let.timeseries.timesnet import masked_mean


class SeriesClassifier(nn.Module):
    """A language model between a linear embedding of each time step and a linear head.

    The model reads no attention mask: padding follows the series, and attention is causal.

    Attributes:
        layer: the aligned layer.
    """

    def __init__(self, model: Any, layer: nn.Module, channels: int, classes: int) -> None:
        """Add the embedding and the head to a base model (no LM head)."""
        super().__init__()
        self.model = model
        self.layer = layer
        width = model.get_input_embeddings().embedding_dim
        self.embedding = nn.Linear(channels, width)
        self.head = nn.Linear(model.config.get_text_config().hidden_size, classes)

    def forward(self, series: Series) -> Tensor:
        """Return the logits, `[b, classes]`, of the mean of the last state over the time steps."""
        states = self.model(inputs_embeds=self.embedding(series.values), use_cache=False)
        return self.head(masked_mean(states.last_hidden_state, series.mask))


def inspect_student(student: str, layer: int) -> TeacherFolder:
    """Locate the student: a folder, a `.gguf` file, or an id on the Hugging Face Hub.

    Raises:
        LETError: it is not a causal language model, or has fewer layers than `layer`.
    """
    if not Path(student).exists() and parse_hub_id(student) is None:
        raise LETError(
            f"The student {student} does not exist; give a model folder, a .gguf file or a hub id."
        )
    folder = inspect_teacher(student)
    if layer > folder.num_layers:
        raise LETError(
            f"student.layer is {layer}; set a layer of {student}, 1 to {folder.num_layers}."
        )
    return folder


def build_classifier(
    folder: TeacherFolder, layer: int, data: DataSet, device: torch.device
) -> SeriesClassifier:
    """Load the model in fp32, with layer k, and add a new embedding and head."""
    # New parameters follow from the seed alone, whatever loading the model draws.
    with torch.random.fork_rng():
        weights = ModelFolder(folder.path, None, folder.dtype)
        model = load_model(weights, torch.float32, "cpu").base_model
    aligned, channels = layer_list(model, folder.num_layers)[layer - 1], data.train.values.shape[2]
    return SeriesClassifier(model, aligned, channels, data.num_classes).to(device)
