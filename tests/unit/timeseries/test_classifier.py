"""The language model as a classifier of series."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from megatron_let.errors import LETError
from megatron_let.teacher.inspect import inspect_teacher
from megatron_let.timeseries.classifier import SeriesClassifier, inspect_student
from megatron_let.timeseries.series import DataSet, load_data_set
from tests.helpers.time_series import NAME, write_waves


@pytest.fixture
def data(tmp_path: Path) -> DataSet:
    return load_data_set(NAME, write_waves(tmp_path))


@pytest.fixture
def model(teacher: Path, data: DataSet) -> SeriesClassifier:
    torch.manual_seed(0)
    return SeriesClassifier(inspect_student(str(teacher), 2, 11), data)


def test_logits_are_those_of_the_model_on_each_series_alone(
    model: SeriesClassifier, data: DataSet, teacher: Path
) -> None:
    plain = LlamaForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    logits = model(data.test)
    for values, mask, found in zip(data.test.values, data.test.mask, logits, strict=True):
        embedded = values[mask] @ model.embedding.weight.T + model.embedding.bias
        output = plain(inputs_embeds=embedded[None], output_hidden_states=True)
        expected = model.head(output.hidden_states[-1][0].mean(0))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_padding_has_no_influence(model: SeriesClassifier, data: DataSet) -> None:
    filled = data.test.values.where(data.test.mask[..., None], 1e3)
    logits = model(data.test)
    assert torch.equal(model(replace(data.test, values=filled)), logits)
    logits.sum().backward()
    gradient = model.embedding.weight.grad
    model.embedding.weight.grad = None
    model(replace(data.test, values=filled)).sum().backward()
    torch.testing.assert_close(model.embedding.weight.grad, gradient, rtol=0, atol=0)


def test_seed_sets_the_new_parameters(teacher: Path, data: DataSet) -> None:
    def new_parameters(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        model = SeriesClassifier(inspect_student(str(teacher), 2, 11), data)
        return torch.cat([model.embedding.weight.flatten(), model.head.weight.flatten()])

    assert torch.equal(new_parameters(3), new_parameters(3))
    assert not torch.equal(new_parameters(3), new_parameters(4))


def test_layer_out_of_range_is_refused(teacher: Path) -> None:
    inspect_student(str(teacher), 3, 11)
    with pytest.raises(LETError, match=r"student.layer is 4; .* has layers 1 to 3\."):
        inspect_student(str(teacher), 4, 11)


def test_missing_student_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LETError, match=r"The student .*none does not exist"):
        inspect_student(str(tmp_path / "none"), 1, 11)


def test_series_longer_than_the_positions_are_refused(teacher: Path) -> None:
    positions = inspect_teacher(str(teacher)).max_positions
    assert positions is not None
    inspect_student(str(teacher), 1, positions)
    with pytest.raises(LETError, match=f"has {positions + 1} steps and .* {positions} positions"):
        inspect_student(str(teacher), 1, positions + 1)
