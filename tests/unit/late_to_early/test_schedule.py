"""The weight follows equation 5, and nothing is left at S_stop."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_let.errors import LETError
from tests.helpers.late_to_early import (
    BATCH,
    D_T,
    LAYER,
    LENGTH,
    STOP_STEP,
    WEIGHT,
    aligned,
    gradients,
    run,
)


def test_stop_step_removes_the_hook_and_nothing_refers_to_the_teacher(
    model: Any, ids: Tensor
) -> None:
    layer = model.model.layers[LAYER - 1]
    before = len(layer._forward_hooks)
    let, references = aligned(model), []
    gc.disable()
    try:
        for step in (0, STOP_STEP - 1):
            state = torch.randn(BATCH, LENGTH, D_T)
            references.append(weakref.ref(state))
            with let.step(step, state):
                model(input_ids=ids, labels=ids).loss.backward()
            del state
            assert references[-1]() is None
    finally:
        gc.enable()
    assert len(layer._forward_hooks) == before + 1
    with let.step(STOP_STEP, None):
        pass
    assert len(layer._forward_hooks) == before and let.report == {}
    with pytest.raises(LETError, match="LET has ended and step 3 is before stop_step 10"):
        let.step(3, torch.randn(BATCH, LENGTH, D_T)).__enter__()


def test_weight_is_equation_5(model: Any) -> None:
    let = aligned(model)
    assert [let.weight(s) for s in (0, 5, 10, 11)] == [WEIGHT, WEIGHT / 2, 0, 0]


def test_evaluation_between_steps_is_not_aligned(model: Any, ids: Tensor, state: Tensor) -> None:
    let = aligned(model)
    run(model, let, ids, state)
    model(input_ids=ids, labels=ids).loss.backward()
    found = gradients(model)
    let.remove()
    model(input_ids=ids, labels=ids).loss.backward()
    assert torch.equal(found, gradients(model))
