"""What is not a step of one microbatch is refused in one sentence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from megatron_let.errors import LETError
from megatron_let.late_to_early import LateToEarly
from tests.helpers.late_to_early import (
    BATCH,
    D_T,
    LENGTH,
    STEP,
    aligned,
    assert_equal,
    expected,
    run,
)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weight": -0.1}, "weight is -0.1"),
        ({"weight": float("nan")}, "weight is nan"),
        ({"stop_step": 0}, "stop_step is 0"),
        ({"loss": "mse"}, "loss is 'mse'; choose one of cosine"),
    ],
)
def test_bad_value_is_one_sentence(changes: dict[str, Any], words: str, model: Any) -> None:
    with pytest.raises(LETError, match=words):
        aligned(model, **changes)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: {"teacher_state": None}, "teacher_state is None at step 4"),
        (lambda s: {"teacher_state": s[:, 1:]}, "hold different tokens"),
        (lambda s: {"teacher_state": s.transpose(0, 1)}, "hold different tokens"),
        (lambda s: {"teacher_state": s[..., :1]}, "cannot interpolate"),
        (lambda s: {"teacher_state": s, "mask": torch.ones(BATCH, 1)}, "one value per token"),
    ],
)
def test_bad_state_is_one_sentence(change: Any, words: str, model: Any, ids: Tensor) -> None:
    let = aligned(model)
    with (
        pytest.raises(LETError, match=words),
        let.step(STEP, **change(torch.randn(BATCH, LENGTH, D_T))),
    ):
        model(input_ids=ids, labels=ids).loss.backward()


def test_cca_with_few_valid_tokens_is_refused(model: Any, ids: Tensor, mask: Tensor) -> None:
    let = aligned(model, loss="cca")
    words = r"correlates 11 features over 43 valid tokens .* needs 44"
    with pytest.raises(LETError, match=words):
        run(model, let, ids, torch.randn(BATCH, LENGTH, 11), mask=mask)


def test_block_without_forward_is_refused(model: Any, state: Tensor) -> None:
    with pytest.raises(LETError, match="did not run"), aligned(model).step(STEP, state):
        pass


def test_block_without_backward_is_refused(model: Any, ids: Tensor, state: Tensor) -> None:
    let = aligned(model)
    with pytest.raises(LETError, match="received no gradient"), let.step(STEP, state):
        loss = model(input_ids=ids, labels=ids).loss
    with pytest.raises(LETError, match=r"after .* had ended"):
        loss.backward()


def test_two_forwards_in_one_block_are_refused(model: Any, ids: Tensor, state: Tensor) -> None:
    let = aligned(model)
    with pytest.raises(LETError, match="ran twice"), let.step(STEP, state):
        model(ids)
        model(ids)
    assert_equal(run(model, let, ids, state), expected(model, ids, state))


def test_two_backwards_in_one_block_are_refused(model: Any, ids: Tensor, state: Tensor) -> None:
    let = aligned(model)
    with pytest.raises(LETError, match="second gradient"), let.step(STEP, state):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward(retain_graph=True)
        loss.backward()
    model.zero_grad()
    assert_equal(run(model, let, ids, state), expected(model, ids, state))


def test_nested_blocks_are_refused(model: Any, state: Tensor) -> None:
    let = aligned(model)
    with (
        pytest.raises(LETError, match="is open"),
        let.step(STEP, state),
        let.step(STEP, state),
    ):
        pass


def test_error_in_the_block_is_not_replaced(model: Any, state: Tensor) -> None:
    with pytest.raises(ZeroDivisionError), aligned(model).step(STEP, state):
        raise ZeroDivisionError


def test_layer_without_a_tensor_is_refused() -> None:
    class Dictionary(torch.nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"hidden": x}

    layer = Dictionary()
    let = LateToEarly(layer)
    words = "Dictionary returned dict"
    with pytest.raises(LETError, match=words), let.step(0, torch.randn(2, 4)):
        layer(torch.randn(2, 8, requires_grad=True))


def test_layer_whose_output_is_a_dtensor_is_refused() -> None:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    try:
        mesh = init_device_mesh("cpu", (1,))
        layer = parallelize_module(
            torch.nn.Linear(8, 8), mesh, ColwiseParallel(use_local_output=False)
        )
        let = LateToEarly(layer)
        words = "Linear returned a DTensor; .*use_local_output=True"
        with pytest.raises(LETError, match=words), let.step(0, torch.randn(2, 4)):
            layer(torch.randn(2, 8))
    finally:
        torch.distributed.destroy_process_group()
