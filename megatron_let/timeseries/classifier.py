"""The student: a causal language model whose input is a time series instead of tokens."""

from pathlib import Path

import torch
from torch import Tensor, nn

from megatron_let.errors import LETError
from megatron_let.evaluation.models import ModelFolder, load_model
from megatron_let.teacher.hub import parse_hub_id
from megatron_let.teacher.inspect import TeacherFolder, inspect_teacher
from megatron_let.timeseries.series import DataSet, Series
from megatron_let.timeseries.timesnet import masked_mean


class SeriesClassifier(nn.Module):
    """A language model in fp32 between a linear embedding of each time step and a linear head.

    The model reads no attention mask: padding follows the series, and attention is causal.
    """

    def __init__(self, folder: TeacherFolder, data: DataSet) -> None:
        """Load the base model (no LM head) and add a new embedding and head for a data set."""
        super().__init__()
        weights = ModelFolder(folder.path, None, folder.dtype)
        self.model = load_model(weights, torch.float32, "cpu").base_model
        width = self.model.get_input_embeddings().embedding_dim
        self.embedding = nn.Linear(data.train.values.shape[2], width)
        self.head = nn.Linear(folder.hidden_size, data.num_classes)

    def forward(self, series: Series) -> Tensor:
        """Return the logits, `[b, classes]`, of the mean of the last state over the time steps."""
        states = self.model(inputs_embeds=self.embedding(series.values), use_cache=False)
        return self.head(masked_mean(states.last_hidden_state, series.mask))


def inspect_student(student: str, layer: int, num_steps: int) -> TeacherFolder:
    """Locate the student: a folder, a `.gguf` file, or an id on the Hugging Face Hub.

    Raises:
        LETError: it is not a causal language model, or has fewer layers than `layer` or fewer
            positions than `num_steps`, those of the longest series.
    """
    if not Path(student).exists() and parse_hub_id(student) is None:
        raise LETError(
            f"The student {student} does not exist; give a model folder, a .gguf file or a hub id."
        )
    folder = inspect_teacher(student)
    if layer > folder.num_layers:
        raise LETError(f"student.layer is {layer}; {student} has layers 1 to {folder.num_layers}.")
    if num_steps > (folder.max_positions or num_steps):
        raise LETError(
            f"The longest series has {num_steps} steps and {student} {folder.max_positions}"
            " positions; give a student with more, or choose sets with --sets."
        )
    return folder
