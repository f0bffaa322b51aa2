"""Training of the teacher and fine-tuning of the student."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megatron_let.errors import LETError
from megatron_let.losses.cosine import token_cosine
from megatron_let.teacher.inspect import TeacherFolder
from megatron_let.timeseries.classifier import SeriesClassifier, inspect_student
from megatron_let.timeseries.series import DataSet, load_data_set
from megatron_let.timeseries.timesnet import TimesNet
from megatron_let.timeseries.training import (
    accuracy,
    fine_tune,
    load_teacher,
    save_teacher,
    train_teacher,
)
from tests.helpers.time_series import NAME, small_settings, write_waves

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    return load_data_set(NAME, write_waves(tmp_path_factory.mktemp("sets")))


@pytest.fixture(scope="module")
def timesnet(data: DataSet) -> TimesNet:
    settings = small_settings()["teacher"]
    return train_teacher([data], settings, CPU, lambda epoch, loss: None).requires_grad_(False)


@pytest.fixture(scope="module")
def student(teacher: Path) -> TeacherFolder:
    return inspect_student(str(teacher), 2, 11)


def results(
    student: TeacherFolder, data: DataSet, teacher: TimesNet | None, seed: int = 1, **changes: Any
) -> list[dict[str, Any]]:
    settings = small_settings(**changes)["student"]
    return list(fine_tune(student, data, teacher, seed, settings, CPU))


def test_teacher_learns(data: DataSet) -> None:
    settings = small_settings()["teacher"] | {"epochs": 15, "learning_rate": 1e-2}
    losses: list[float] = []
    model = train_teacher([data], settings, CPU, lambda epoch, loss: losses.append(loss))
    assert len(losses) == 15 and losses[-1] < losses[0] / 4
    assert accuracy(lambda series: model(series, NAME), data.test, CPU) > 0.9


def test_teacher_of_two_sets_has_a_head_for_each(data: DataSet) -> None:
    one_channel = replace(data.train, values=data.train.values[..., :1], labels=data.train.labels)
    other = DataSet("Other", one_channel, one_channel, 3)
    settings = small_settings()["teacher"] | {"epochs": 1}
    model = train_teacher([data, other], settings, CPU, lambda epoch, loss: None)
    assert model(data.test, NAME).shape == (12, 2)
    assert model(other.test, "Other").shape == (12, 3)


def test_saved_teacher_is_the_same(tmp_path: Path, data: DataSet, timesnet: TimesNet) -> None:
    save_teacher(tmp_path / "teacher.pt", timesnet, small_settings()["teacher"])
    loaded = load_teacher(tmp_path / "teacher.pt", CPU)
    assert torch.equal(loaded.encode(data.test), timesnet.encode(data.test))
    assert not any(p.requires_grad for p in loaded.parameters()) and not loaded.training


@pytest.mark.parametrize("damage", ["text", "cut", "another model", "a setting less"])
def test_damaged_teacher_is_refused(tmp_path: Path, timesnet: TimesNet, damage: str) -> None:
    path, settings = tmp_path / "teacher.pt", small_settings()["teacher"]
    if damage == "a setting less":
        del settings["kernels"]
    save_teacher(path, timesnet, settings)
    if damage == "text":
        path.write_text("no teacher")
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:2000])
    elif damage == "another model":
        torch.save({"weight": torch.zeros(2)}, path)
    with pytest.raises(LETError, match="does not load"):
        load_teacher(path, CPU)


def test_missing_teacher_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LETError, match=r"does not load \(FileNotFoundError\); make it"):
        load_teacher(tmp_path / "teacher.pt", CPU)


def test_weight_0_is_the_baseline(
    student: TeacherFolder, data: DataSet, timesnet: TimesNet
) -> None:
    assert results(student, data, timesnet, weight=0.0) == results(student, data, None)


def test_first_batch_is_the_same_without_and_with_let(
    student: TeacherFolder, data: DataSet, timesnet: TimesNet
) -> None:
    # One batch per epoch, whose loss is computed before its update.
    sizes = {"batch_size": 12, "epochs": 2, "learning_rate": 1e-2, "stop_fraction": 1.0}
    first, second = results(student, data, None, **sizes, warmup_fraction=0.0)
    with_let = results(student, data, timesnet, **sizes, warmup_fraction=0.0, weight=10.0)
    assert with_let[0]["loss"] == first["loss"]
    assert with_let[1]["loss"] != second["loss"]
    assert results(student, data, None, seed=2, **sizes)[0]["loss"] != first["loss"]


def test_alignment_raises_the_cosine_until_stop_step(
    student: TeacherFolder, data: DataSet, timesnet: TimesNet
) -> None:
    def cosines(weight: float) -> list[float | None]:
        settings = {"weight": weight, "learning_rate": 1e-2, "epochs": 4, "stop_fraction": 0.75}
        return [e["cosine"] for e in results(student, data, timesnet, **settings)]

    *strong, last = cosines(10.0)
    *weak, _ = cosines(1e-6)
    assert last is None and None not in strong
    assert strong[2] > strong[0] and strong[2] > weak[2]


def test_cosine_is_that_of_valid_time_steps(
    student: TeacherFolder, data: DataSet, timesnet: TimesNet
) -> None:
    torch.manual_seed(1)
    model = SeriesClassifier(student, data)
    states: list[torch.Tensor] = []
    model.model.layers[1].register_forward_hook(lambda layer, inputs, output: states.append(output))
    with torch.no_grad():
        model(data.train)
    mask = data.train.mask
    expected = token_cosine(states[0][mask], timesnet.encode(data.train)[mask]).mean()
    found = results(student, data, timesnet, batch_size=12, epochs=1, stop_fraction=1.0)
    assert found[0]["cosine"] == pytest.approx(float(expected), abs=1e-5)


def test_values_in_padding_change_no_result(
    student: TeacherFolder, data: DataSet, timesnet: TimesNet
) -> None:
    parts = [
        replace(part, values=part.values.where(part.mask[..., None], 1e3))
        for part in (data.train, data.test)
    ]
    filled = replace(data, train=parts[0], test=parts[1])
    assert results(student, filled, timesnet) == results(student, data, timesnet)


def test_accuracy_counts_largest_logits(data: DataSet) -> None:
    def logits(series: Any) -> torch.Tensor:
        # Right for class 1 alone.
        return F.one_hot(torch.ones_like(series.labels), 2).float()

    assert accuracy(logits, data.test, CPU) == 0.5
