"""LET under FSDP2 on two ranks has the gradient of one process."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from megatron_let.late_to_early import LateToEarly
from tests.helpers.fully_sharded import LAYER, batch
from tests.helpers.models import random_model
from tests.helpers.runs import TIMEOUT_SECONDS, command, environment

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("hook", ["before", "after"])
def test_two_sharded_ranks_equal_one_process(hook: str, tmp_path: Path) -> None:
    subprocess.run(
        command(2, "tests.helpers.fully_sharded"),
        check=True,
        env=environment(OUTPUT=str(tmp_path), HOOK=hook),
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
