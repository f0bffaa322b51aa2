"""Recompute and torch.compile give the same gradient."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_let.late_to_early import LateToEarly
from tests.helpers.compiling import dynamo_enabled
from tests.helpers.late_to_early import aligned, assert_equal, gradients, run


@pytest.fixture
def dynamo() -> Iterator[None]:
    with dynamo_enabled():
        yield


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.medium)])
def test_recomputed_layers_have_the_same_gradient(
    reentrant: bool, compiled: bool, model: Any, ids: Tensor, state: Tensor, mask: Tensor
) -> None:
    wanted = run(model, aligned(model), ids, state, mask=mask)
    model.config.use_cache = False
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    let = aligned(model)
    student = torch.compile(model, backend="eager") if compiled else model
    assert_equal(run(student, let, ids, state, mask=mask), wanted)


def test_checkpoint_around_the_layer_aligns_once() -> None:
    layer, hidden = torch.nn.Linear(8, 8), torch.randn(3, 8, requires_grad=True)
    let, state = LateToEarly(layer), torch.randn(3, 4)
    found = []
    for reentrant in (None, True, False):
        with let.step(0, state):
            output = (
                layer(hidden)
                if reentrant is None
                else checkpoint(layer, hidden, use_reentrant=reentrant)
            )
            output.square().sum().backward()
        found.append(layer.weight.grad)
        layer.zero_grad()
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.usefixtures("dynamo")
@pytest.mark.medium
def test_compiled_model_follows_the_schedule(model: Any, ids: Tensor, state: Tensor) -> None:
    found = []
    for student in (model, torch.compile(model, backend="aot_eager")):
        let, rows = aligned(model, stop_step=3), []
        for step in range(5):
            with let.step(step, state * (1 + step) if step < 3 else None):
                student(input_ids=ids, labels=ids).loss.backward()
            rows.append(gradients(model))
            assert bool(let.report) == (step < 3)
            with torch.no_grad():
                student(input_ids=ids)
        found.append(torch.stack(rows))
    assert_equal(found[1], found[0], 1e-6)
    assert not torch.equal(found[0][2], found[0][3])


@pytest.mark.usefixtures("dynamo")
def test_compiled_full_graph_is_refused_by_name(model: Any, ids: Tensor, state: Tensor) -> None:
    layer = torch.nn.Linear(8, 8)
    let = LateToEarly(layer)
    student = torch.compile(torch.nn.Sequential(layer), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="AlignmentHook"), let.step(0, torch.randn(3, 4)):
        student(torch.randn(3, 8))
