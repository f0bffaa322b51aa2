"""Equation 10 in real runs: the alignment loss has no gradient after layer k.

Runs from the same weights on the same batch, with different weights of the alignment loss: the
gradients after layer k are bitwise equal, and those up to layer k differ.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.helpers.runs import train

pytestmark = pytest.mark.distributed

NUM_LAYERS = 4
MIDDLE = 2


def first_gradient(
    folder: Path, teacher: Path, data: Path, *, layer: int, weight: float
) -> dict[str, Tensor]:
    """Return the gradient of every parameter at the first step, as Megatron saves it."""
    train(
        folder, "--let-layer", layer, "--let-weight", weight,
        "--data-path", data, "--train-iters", 1, "--lr-warmup-iters", 0, "--eval-iters", 0,
        "--save", folder / "saved", "--save-interval", 1, "--ckpt-format", "torch",
        "--save-wgrads-interval", 1,
        TEACHER=str(teacher),
    )  # fmt: skip
    file = folder / "saved" / "wgrads" / "iter_0000001" / "mp_rank_00.pth"
    return torch.load(file)["model_chunk0"]


def reached(name: str, layer: int) -> bool:
    """Return whether the state after layer `layer` (1-based) depends on the parameter."""
    if name.startswith("embedding."):
        return True
    match = re.match(r"decoder\.layers\.(\d+)\.", name)
    return match is not None and int(match[1]) < layer


@pytest.fixture(scope="module")
def gradients(
    teacher: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[int, float], dict[str, Tensor]]:
    """Gradients by (k, lambda_0); lambda_0 = 0 runs without a teacher."""
    runs = [(MIDDLE, 0.0), (MIDDLE, 0.1), (MIDDLE, 1.0), (NUM_LAYERS, 1.0)]
    return {
        (layer, weight): first_gradient(
            tmp_path_factory.mktemp("run"), teacher, data, layer=layer, weight=weight
        )
        for layer, weight in runs
    }


@pytest.mark.parametrize(
    ("layer", "weight", "other"),
    [
        (MIDDLE, 0.1, (MIDDLE, 1.0)),
        (MIDDLE, 1.0, (MIDDLE, 0.0)),
        (NUM_LAYERS, 1.0, (MIDDLE, 0.0)),
    ],
)
def test_gradient_ends_at_layer_k(
    gradients: dict[tuple[int, float], dict[str, Tensor]],
    layer: int,
    weight: float,
    other: tuple[int, float],
) -> None:
    ours, theirs = gradients[layer, weight], gradients[other]
    assert ours.keys() == theirs.keys()
    after = {name for name in ours if not reached(name, layer)}
    # Each layer has four matrices and two norms; the final norm and the output layer come last.
    assert len(after) == 6 * (NUM_LAYERS - layer) + 2
    for name, gradient in ours.items():
        assert gradient.count_nonzero() > 0, name
        assert torch.equal(gradient, theirs[name]) == (name in after), name


def test_gradient_is_linear_in_the_weight(
    gradients: dict[tuple[int, float], dict[str, Tensor]],
) -> None:
    """The gradient that the alignment loss adds up to layer k is proportional to its weight."""
    none, light, heavy = (gradients[MIDDLE, weight] for weight in (0.0, 0.1, 1.0))
    for name in filter(lambda name: reached(name, MIDDLE), none):
        added, ten_times = light[name] - none[name], heavy[name] - none[name]
        assert torch.norm(10 * added - ten_times) < 1e-4 * torch.norm(ten_times), name
