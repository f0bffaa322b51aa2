"""The examples of docs/extending.md run as written."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_let.config import let_config
from megatron_let.config.arguments import add_arguments, let_config_from_args
from megatron_let.config.let_config import MethodTraits
from megatron_let.losses import load_loss
from megatron_let.methods import METHODS, TrainingRun, build_method
from megatron_let.teacher.inspect import inspect_teacher
from tests.helpers import plain_reference as plain
from tests.helpers.models import VOCAB_SIZE, save_teacher
from tests.helpers.runs import ROOT, free_port

LAYER, STOP_STEP, WEIGHT = 2, 3, 0.5
SHAPE = (2, 2, 8)  # microbatches, samples, tokens


def example(number: int) -> ModuleType:
    """Run a Python block of the page as a module."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/extending.md").read_text(), re.S)
    module = ModuleType(f"example_{number}")
    exec(blocks[number], module.__dict__)
    return module


def test_loss_equals_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "megatron_let.losses.mse", example(0))
    loss = load_loss("mse", None)
    hidden, teacher, incoming = (
        torch.randn(5, 3, width, dtype=torch.float64) for width in (24, 16, 24)
    )
    leaf = hidden.clone().requires_grad_()
    values = (plain.interpolate(leaf, 16) - teacher).square().mean(-1)
    (expected,) = torch.autograd.grad(values.sum(), leaf)
    gradient, reported = loss.function(hidden, teacher, torch.tensor(0.3), incoming)
    torch.testing.assert_close(gradient, incoming + 0.3 * expected)
    found = dict(zip(loss.names, reported, strict=True))
    torch.testing.assert_close(found["mse"], values.detach())
    cosine = torch.cosine_similarity(plain.interpolate(hidden, 16), teacher, dim=-1)
    torch.testing.assert_close(found["cosine"], cosine)


# A method, in one global batch of a student with three linear layers


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Process groups of one rank."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    torch.distributed.init_process_group("gloo", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


class Student(torch.nn.Module):
    """The part of a GPTModel that LET uses."""

    config = SimpleNamespace(
        sequence_parallel=False,
        calculate_per_token_loss=False,
        finalize_model_grads_func=None,
        grad_scale_func=None,
        microbatch_group_size_per_vp_stage=None,
        overlap_p2p_comm=False,
    )

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(VOCAB_SIZE, 24)
        self.decoder = torch.nn.Module()
        self.decoder.layers = torch.nn.ModuleList(torch.nn.Linear(24, 24) for _ in range(3))
        for number, layer in enumerate(self.decoder.layers, start=1):
            layer.layer_number = number

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens.T)
        for layer in self.decoder.layers:
            hidden = layer(hidden)
        return hidden


def forward_backward(
    *, forward_step_func: Any, data_iterator: Any, model: list[Any], **_: Any
) -> list[dict[str, Tensor]]:
    """Run every microbatch; the loss is the mean of the student's output."""
    reports = []
    for _ in range(SHAPE[0]):
        loss = forward_step_func(data_iterator, model[0])
        loss.backward()
        reports.append({"lm loss": loss.detach()})
    return reports


def train(method: Any, student: Student) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """Run one global batch; return what it reports and the gradients."""
    student.zero_grad()
    tokens = torch.arange(torch.tensor(SHAPE).prod()).view(SHAPE)
    data = iter([{"tokens": t, "loss_mask": torch.ones(t.shape)} for t in tokens])
    reports = method.run(
        forward_backward,
        forward_step_func=lambda iterator, model: model(next(iterator)["tokens"]).mean(),
        data_iterator=data,
        model=[student],
        num_microbatches=SHAPE[0],
        micro_batch_size=SHAPE[1],
        seq_length=SHAPE[2],
        forward_only=False,
    )
    return reports, {name: p.grad.clone() for name, p in student.named_parameters()}


@pytest.mark.usefixtures("one_rank")
def test_registered_method_has_constant_weight_and_frees_the_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alignment = let_config.METHODS["let"].uses
    monkeypatch.setitem(let_config.METHODS, "constant", MethodTraits("states", alignment))
    monkeypatch.setitem(METHODS, "constant", example(1).ConstantLET)
    teacher, step, lines = save_teacher(tmp_path), 0, []
    flags = ["--let-method", "constant", "--let-teacher", str(teacher), "--let-layer", str(LAYER)]
    flags += ["--let-weight", str(WEIGHT), "--let-stop-step", str(STOP_STEP)]
    args = add_arguments(argparse.ArgumentParser()).parse_args(flags)
    run = TrainingRun(
        config=let_config_from_args(args),
        folder=inspect_teacher(teacher),
        vocab_size=VOCAB_SIZE,
        seed=1,
        num_steps=10,
        current_step=lambda: step,
        loaded_checkpoint=lambda: None,
        report=lines.append,
    )
    method, student = build_method(run), Student()
    reports, aligned = train(method, student)
    step = STOP_STEP - 1
    assert all(report["let weight"] == WEIGHT for report in (*reports, *train(method, student)[0]))
    step = STOP_STEP
    reports, plain_gradients = train(method, student)
    assert "let weight" not in reports[0] and any("freed" in line for line in lines)
    # Only layers up to k get a gradient from the teacher.
    changed = {name for name in aligned if not torch.equal(aligned[name], plain_gradients[name])}
    assert changed == {name for name in aligned if not name.startswith("decoder.layers.2")}
    assert str(STOP_STEP) in method.describe()


def test_page_has_every_package_in_one_list() -> None:
    page = (ROOT / "docs/extending.md").read_text().partition("## What may change")[2]
    packages = [path.parent.name for path in (ROOT / "megatron_let").glob("*/__init__.py")]
    assert {name: page.count(f"`{name}/`") for name in packages} == dict.fromkeys(packages, 1)
