"""The gradient and the report equal the plain formula: masks, accumulation, mixed precision."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_let.losses import LOSSES
from tests.helpers import plain_reference as plain
from tests.helpers.late_to_early import (
    BATCH,
    DECAYED,
    LAYER,
    LENGTH,
    MEANS,
    STEP,
    WEIGHT,
    aligned,
    assert_equal,
    expected,
    gradients,
    run,
)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("masked", [False, True])
def test_gradient_and_report_equal_the_plain_formula(
    loss: str, masked: bool, model: Any, ids: Tensor, state: Tensor, mask: Tensor
) -> None:
    state = state[..., :6] if loss == "cca" else state
    valid = mask if masked else None
    let = aligned(model, loss=loss)
    # NaN at padded tokens reaches neither the gradient nor the report.
    padded = state.masked_fill(mask[..., None] == 0, torch.nan) if masked else state
    found = run(model, let, ids, padded, mask=valid)
    wanted = expected(model, ids, state, loss, valid)
    assert_equal(found, wanted)
    hidden = model(ids, output_hidden_states=True).hidden_states[LAYER].detach()
    kept = torch.ones_like(mask).bool() if valid is None else mask.bool()
    cosine = plain.mean_cosine(hidden[kept], state[kept])
    assert let.report["cosine"].item() == pytest.approx(cosine.item(), abs=1e-6)
    assert list(let.report) == (["cosine"] if loss == "cosine" else ["cosine", loss])


def test_layers_after_the_aligned_one_are_unchanged_bitwise(
    model: Any, ids: Tensor, state: Tensor
) -> None:
    found = []
    for weight in (0.0, WEIGHT):
        let = aligned(model, weight=weight)
        with let.step(STEP, state):
            model(input_ids=ids, labels=ids).loss.backward()
        let.remove()
        found.append({name: p.grad for name, p in model.named_parameters()})
        model.zero_grad()
    changed = {name for name in found[0] if not torch.equal(found[0][name], found[1][name])}
    before = {name for name in found[0] if re.match(r"model\.(embed|layers\.[01]\.)", name)}
    assert changed == before


@pytest.mark.parametrize("sizes", [[2, 2], [1, 3]])
def test_accumulated_microbatches_equal_one_batch(
    sizes: list[int], model: Any, ids: Tensor, state: Tensor, mask: Tensor
) -> None:
    labels = ids.masked_fill(mask == 0, -100)
    let = aligned(model)
    with let.step(STEP, state, mask=mask):
        loss = model(input_ids=ids, labels=labels, num_items_in_batch=mask.sum()).loss
        loss.backward()
    wanted = gradients(model)
    for part, part_state, part_mask, part_labels in zip(
        *(x.split(sizes) for x in (ids, state, mask, labels)), strict=True
    ):
        with let.step(STEP, part_state, mask=part_mask, num_tokens=mask.sum()):
            output = model(input_ids=part, labels=part_labels, num_items_in_batch=mask.sum())
            output.loss.backward()
    assert_equal(gradients(model), wanted)


def test_microbatch_without_valid_tokens_adds_nothing(
    model: Any, ids: Tensor, state: Tensor, mask: Tensor
) -> None:
    model(input_ids=ids, labels=ids).loss.backward()
    wanted = gradients(model)
    let = aligned(model)
    assert torch.equal(run(model, let, ids, state, mask=mask * 0), wanted)
    assert let.report["cosine"].isnan()


@pytest.mark.parametrize("backward_inside", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_alignment_is_computed_in_fp32_under_autocast(
    loss: str, backward_inside: bool, model: Any, ids: Tensor, state: Tensor
) -> None:
    state = state[..., :6] if loss == "cca" else state
    let = aligned(model, loss=loss)
    direction, hidden = [], []
    layer = model.model.layers[LAYER - 1]
    # What the layer gets as its gradient, and its output before the alignment.
    layer.mlp.register_forward_hook(
        lambda m, i, output: output.register_hook(direction.append) and None
    )
    layer.register_forward_hook(lambda m, i, output: hidden.append(output.detach()))
    with torch.autocast("cpu", torch.bfloat16), let.step(STEP, state):
        inputs = torch.randn(BATCH, LENGTH, 64, requires_grad=True)
        output = layer(inputs, position_embeddings=rotary())
        with torch.autocast("cpu", torch.bfloat16, enabled=backward_inside):
            (output.float() * 0).sum().backward()
    leaf = hidden[0].float().requires_grad_()
    (DECAYED * MEANS[loss](leaf, state)).backward()
    assert leaf.grad is not None
    # The output of the MLP is bf16.
    assert_equal(direction[0].float(), leaf.grad, 6e-3)


def rotary() -> tuple[Tensor, Tensor]:
    return torch.ones(1, LENGTH, 16), torch.zeros(1, LENGTH, 16)


def test_grad_scaler_gives_the_unscaled_gradient(model: Any, ids: Tensor, state: Tensor) -> None:
    let = aligned(model)
    wanted = run(model, let, ids, state)
    optimizer = torch.optim.SGD(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    with let.step(STEP, state, loss_scale=scaler.get_scale()):
        scaler.scale(model(input_ids=ids, labels=ids).loss).backward()
    scaler.unscale_(optimizer)
    assert_equal(gradients(model), wanted)
