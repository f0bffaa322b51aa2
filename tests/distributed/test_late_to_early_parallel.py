"""LET outside Megatron on two ranks of FSDP2 or DDP has the gradient of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_let.late_to_early import LateToEarly
from tests.helpers.models import random_model
from tests.helpers.parallel_student import LAYER, WRAPS, batch
from tests.helpers.runs import run_forked

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("wrap", WRAPS)
def test_two_ranks_equal_one_process(wrap: str, tmp_path: Path) -> None:
    code, log = run_forked(
        "tests.helpers.parallel_student", folder=tmp_path, ranks=2, OUTPUT=str(tmp_path), WRAP=wrap
    )
    assert code == 0, log
    found = torch.load(tmp_path / "found.pt")
    model = random_model("llama").train()
    let = LateToEarly(model.model.layers[LAYER - 1], 5.0)
    ids, state = batch()
    with let.step(0, state):
        model(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        ours, theirs = found["gradients"][name], parameter.grad
        assert (ours - theirs).norm() < 1e-5 * theirs.norm(), name
    assert found["cosine"].item() == pytest.approx(let.report["cosine"].item(), abs=1e-6)
