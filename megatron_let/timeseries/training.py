"""Train the teacher on several data sets, and fine-tune a student on one."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup

from megatron_let.errors import LETError
from megatron_let.files.atomic import atomic_file
from megatron_let.late_to_early import LateToEarly
from megatron_let.teacher.inspect import TeacherFolder
from megatron_let.teacher.model import layer_list
from megatron_let.timeseries.classifier import SeriesClassifier
from megatron_let.timeseries.series import DataSet, Series
from megatron_let.timeseries.settings import Settings
from megatron_let.timeseries.timesnet import TimesNet

_EVALUATION_BATCH = 32
_MAX_GRADIENT_NORM = 1.0


def train_teacher(
    sets: Sequence[DataSet],
    settings: Settings,
    device: torch.device,
    report: Callable[[int, float], None],
) -> TimesNet:
    """Train one TimesNet on all sets, in batches of one set each in random order.

    After each epoch, `report` is called with its number and mean loss.
    """
    torch.manual_seed(settings["seed"])
    order = torch.Generator().manual_seed(settings["seed"])
    model = TimesNet(settings, {data.name: data.num_classes for data in sets}).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), settings["learning_rate"])
    for epoch in range(settings["epochs"]):
        size, losses = settings["batch_size"], []
        batches = [(data, rows) for data in sets for rows in _batches(data.train, size, order)]
        for place in torch.randperm(len(batches), generator=order).tolist():
            data, rows = batches[place]
            batch = data.train.rows(rows, device)
            loss = F.cross_entropy(model(batch, data.name), batch.labels)
            loss.backward()
            losses.append(_update(model, optimizer, loss))
        report(epoch + 1, float(torch.stack(losses).mean()))
    return model.eval()


def save_teacher(path: Path, model: TimesNet, settings: Settings) -> None:
    """Save a teacher, with its settings."""
    classes = {name: head.out_features for name, head in model.heads.items()}
    with atomic_file(path) as partial:
        torch.save((dict(settings), classes, model.state_dict()), partial)


def load_teacher(path: Path, device: torch.device) -> TimesNet:
    """Load a teacher, frozen.

    Raises:
        LETError: the file does not exist, or is not one of `save_teacher`.
    """
    try:
        settings, classes, weights = torch.load(path, map_location=device, weights_only=True)
        model = TimesNet(settings, classes)
        model.load_state_dict(weights)
    except Exception as error:  # of pickle, zip, torch, or a missing setting
        problem = f"The teacher {path} does not load ({type(error).__name__})"
        raise LETError(f"{problem}; make it with `pretrain-teacher`.") from error
    return model.eval().requires_grad_(False).to(device)


def fine_tune(
    student: TeacherFolder,
    data: DataSet,
    teacher: TimesNet | None,
    seed: int,
    settings: Settings,
    device: torch.device,
) -> Iterator[dict[str, Any]]:
    """Fine-tune a student on one set and yield the results of each epoch.

    The seed sets the new parameters and the order of the series. A teacher, with which layer k is
    aligned, changes neither.

    Yields:
        `loss` and `cosine`, means over the epoch's batches (cosine: those with LET, or None), and
        `test_accuracy` after the epoch.
    """
    torch.manual_seed(seed)
    order = torch.Generator().manual_seed(seed)
    model = SeriesClassifier(student, data).to(device)
    aligned = layer_list(model.model, student.num_layers)[settings["layer"] - 1]
    num_steps = settings["epochs"] * -(-len(data.train.labels) // settings["batch_size"])
    stop_step = max(1, round(settings["stop_fraction"] * num_steps))
    let = LateToEarly(aligned, settings["weight"] if teacher else 0.0, stop_step)
    lr, decay = settings["learning_rate"], settings["weight_decay"]
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=decay, fused=True)
    warmup_steps = round(settings["warmup_fraction"] * num_steps)
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup_steps, num_steps)
    step = 0
    for _ in range(settings["epochs"]):
        model.train()
        losses: list[Tensor] = []
        cosines: list[Tensor] = []
        for rows in _batches(data.train, settings["batch_size"], order):
            batch = data.train.rows(rows, device)
            short, state = batch.trimmed(), None
            if teacher is not None and let.weight(step) > 0:
                with torch.no_grad():
                    state = teacher.encode(batch)[:, : short.mask.shape[1]]
            with let.step(step, state, mask=short.mask):
                loss = F.cross_entropy(model(short), short.labels)
                loss.backward()
            losses.append(_update(model, optimizer, loss))
            schedule.step()
            cosines += let.report.values()
            step += 1
        model.eval()
        yield {
            "loss": float(torch.stack(losses).mean()),
            "cosine": float(torch.stack(cosines).mean()) if cosines else None,
            "test_accuracy": accuracy(lambda batch: model(batch.trimmed()), data.test, device),
        }


def _batches(series: Series, size: int, order: torch.Generator) -> tuple[Tensor, ...]:
    return torch.randperm(len(series.labels), generator=order).split(size)


def _update(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> Tensor:
    nn.utils.clip_grad_norm_(model.parameters(), _MAX_GRADIENT_NORM)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


@torch.no_grad()
def accuracy(logits: Callable[[Series], Tensor], series: Series, device: torch.device) -> float:
    """Return the fraction of series whose largest logit is that of their label."""
    correct = 0
    # Series of one length side by side have the least padding.
    for rows in series.mask.sum(1).argsort().split(_EVALUATION_BATCH):
        batch = series.rows(rows, device)
        correct += int((logits(batch).argmax(1) == batch.labels).sum())
    return correct / len(series.labels)
