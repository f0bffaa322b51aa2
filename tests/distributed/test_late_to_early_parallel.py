"""LET outside Megatron on two ranks of FSDP2 or DDP has the gradient of one process."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from megatron_let.late_to_early import LateToEarly
from tests.helpers.models import random_model
from tests.helpers.parallel_student import LAYER, WRAPS, batch
from tests.helpers.runs import TIMEOUT_SECONDS, command, environment

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("wrap", WRAPS)
def test_two_ranks_equal_one_process(wrap: str, tmp_path: Path) -> None:
    subprocess.run(
        command(2, "tests.helpers.parallel_student"),
        check=True,
        env=environment(OUTPUT=str(tmp_path), WRAP=wrap),
        timeout=TIMEOUT_SECONDS,
    )
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
