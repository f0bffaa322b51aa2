"""The learned projection: its gradients, its Adam, and when it is updated."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_let.config.let_config import LETConfig
from megatron_let.losses import LOSSES, load_loss
from megatron_let.methods.learned_projection import (
    LearnedProjection,
    ProjectionTraining,
    with_projection,
)
from tests.helpers import plain_reference as plain

SCALE = torch.tensor(0.37, dtype=torch.float64)
ALONE: Any = SimpleNamespace(size=lambda: 1)
BY_HAND = {
    "cosine": lambda p, t: -plain.mean_cosine(p, t),
    "logsum": plain.mean_logsum,
    "cca": lambda p, t: -plain.mean_correlation(p, t),
}


def adam(rate: float, decay: float, epsilon: float, decoupled: bool) -> dict[str, Any]:
    """Return the hyperparameters of one update."""
    return {"lr": rate, "weight_decay": decay, "beta1": 0.9, "beta2": 0.95, "eps": epsilon,
            "decoupled_weight_decay": decoupled}  # fmt: skip


def new_projection(seed: int = 1) -> LearnedProjection:
    """Return a projection from width 24 to width 16."""
    return LearnedProjection(24, 16, 0.3, seed, torch.device("cpu"))


def states(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Return the states [s, b, d] of student and teacher."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(50, 3, 24, generator=generator, dtype=torch.float64)
    teacher = torch.randn(50, 3, 16, generator=generator, dtype=torch.float64)
    teacher += student[..., :16] + 1
    return student.to(dtype), teacher.to(dtype)


def gradients(
    name: str, projection: LearnedProjection, student: Tensor, teacher: Tensor
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return the gradients of the student and of W, and the reported values."""
    loss = with_projection(load_loss(name, None), projection)
    incoming = torch.ones_like(student)
    gradient, values = loss.function(student, teacher, SCALE, incoming)
    assert torch.equal(incoming, torch.ones_like(student))
    return gradient, projection.gradient, values


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_of_student_and_weight_match_autograd(name: str) -> None:
    student, teacher = states()
    projection = new_projection().double()
    of_student, of_weight, values = gradients(name, projection, student, teacher)
    leaf, weight = student.clone().requires_grad_(), projection.weight.clone().requires_grad_()
    projected = leaf @ weight.T
    (BY_HAND[name](projected, teacher) * 150).backward()
    assert leaf.grad is not None and weight.grad is not None
    torch.testing.assert_close(of_student, 1 + SCALE * leaf.grad, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(of_weight, weight.grad, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(values[0], F.cosine_similarity(projected, teacher, dim=-1).detach())


def test_gradient_accumulates_over_microbatches() -> None:
    student, teacher = states()
    projection, halves = new_projection().double(), new_projection().double()
    gradients("cosine", projection, student, teacher)
    for tokens in (slice(0, 20), slice(20, 50)):
        gradients("cosine", halves, student[tokens], teacher[tokens])
    torch.testing.assert_close(halves.gradient, projection.gradient)


def test_gradients_of_bf16_states_are_computed_in_fp32() -> None:
    student, teacher = states(torch.bfloat16)
    projection, exact = new_projection(), new_projection().double()
    ours = gradients("cosine", projection, student, teacher)
    theirs = gradients("cosine", exact, student.double(), teacher.double())
    assert ours[0].dtype == torch.bfloat16
    torch.testing.assert_close(ours[1].double(), theirs[1], rtol=1e-4, atol=1e-5)


def test_initial_weight_depends_on_seed_only() -> None:
    before = torch.get_rng_state()
    projection = new_projection()
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(projection.weight, new_projection().weight)
    assert not torch.equal(projection.weight, new_projection(seed=2).weight)
    assert projection.weight.std() == pytest.approx(0.3, rel=0.1)
    assert not list(projection.parameters()), "Megatron would train parameters too"


@pytest.mark.parametrize("decoupled", [True, False])
def test_update_equals_torchs_adam(decoupled: bool) -> None:
    projection = new_projection()
    weight = torch.nn.Parameter(projection.weight.clone())
    optimizer = (torch.optim.AdamW if decoupled else torch.optim.Adam)(
        [weight], betas=(0.9, 0.95), eps=1e-7
    )
    generator = torch.Generator().manual_seed(0)
    for step in range(4):
        rate, decay = 0.01 * (step + 1), 0.1 * step
        projection.gradient.normal_(generator=generator)
        weight.grad = projection.gradient * 0.5
        optimizer.param_groups[0] |= {"lr": rate, "weight_decay": decay}
        projection.update(0.5, ALONE, adam(rate, decay, 1e-7, decoupled))
        optimizer.step()
        torch.testing.assert_close(projection.weight, weight.detach())
    assert projection.step == 4


# In the step of Megatron's optimizer


class Optimizer:
    """The part of Megatron's optimizer that a projection uses."""

    config = SimpleNamespace(
        adam_beta1=0.9, adam_beta2=0.95, adam_eps=1e-8, decoupled_weight_decay=True
    )
    param_groups = (
        {"lr": 7.0, "weight_decay": 7.0, "wd_mult": 1.0, "default_config": False},
        {"lr": 0.1, "weight_decay": 0.0, "wd_mult": 0.0, "default_config": True},
        {"lr": 0.1, "weight_decay": 0.5, "wd_mult": 1.0, "default_config": True},
    )

    def __init__(self, updated: bool) -> None:
        self._updated = updated

    def step(self) -> tuple[bool, None, None]:
        return self._updated, None, None


@pytest.fixture
def chunk(monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    """A model with one layer, on one rank."""
    layer = torch.nn.Linear(24, 24)
    layer.layer_number = 1
    chunk = torch.nn.Module()
    chunk.decoder = torch.nn.Module()
    chunk.decoder.layers = torch.nn.ModuleList([layer])
    chunk.config = SimpleNamespace(hidden_size=24, init_method_std=0.3, sequence_parallel=False)
    monkeypatch.setattr(
        "megatron_let.methods.learned_projection._ranks_with_tokens", lambda _: ALONE
    )
    return chunk


def run_of(layer: int, **values: Any) -> Any:
    return SimpleNamespace(
        **{
            "config": LETConfig(layer=layer),
            "folder": SimpleNamespace(hidden_size=16),
            "seed": 1,
            "loaded_checkpoint": lambda: None,
            "report": lambda line: None,
            **values,
        }
    )


def set_up(
    chunk: torch.nn.Module, optimizer: Optimizer, *, last: bool = False, layer: int = 1
) -> ProjectionTraining:
    training = ProjectionTraining(run_of(layer), lambda: last)
    model = training.wrap_setup(lambda: ([chunk], optimizer, None))()[0]
    assert model == [chunk]
    return training


def test_update_uses_rate_and_decay_of_matrices(chunk: torch.nn.Module) -> None:
    optimizer = Optimizer(updated=True)
    training = set_up(chunk, optimizer)
    module, expected = training.module, new_projection()
    assert module is not None and torch.equal(module.weight, expected.weight)
    for _ in range(2):
        training.open_step(weight=0.4, num_tokens=8)
        module.gradient += 3.0
        expected.gradient.fill_(3.0)
        assert optimizer.step() == (True, None, None)
        expected.update(0.05, ALONE, adam(0.1, 0.5, 1e-8, True))
        assert torch.equal(module.weight, expected.weight)


def test_replayed_batch_counts_once(chunk: torch.nn.Module) -> None:
    """As Megatron's rerun machine does before the optimizer's step."""
    optimizer = Optimizer(updated=True)
    training, expected = set_up(chunk, optimizer), new_projection()
    assert training.module is not None
    for value in (5.0, 3.0):
        training.open_step(0.4, 8)
        training.module.gradient += value
    optimizer.step()
    expected.gradient.fill_(3.0)
    expected.update(0.05, ALONE, adam(0.1, 0.5, 1e-8, True))
    assert torch.equal(training.module.weight, expected.weight)


def test_update_is_skipped_with_megatrons(chunk: torch.nn.Module) -> None:
    optimizer = Optimizer(updated=False)
    training = set_up(chunk, optimizer)
    assert training.module is not None
    training.open_step(0.4, 8)
    training.module.gradient += 3.0
    optimizer.step()
    assert training.module.step == 0
    assert torch.equal(training.module.weight, new_projection().weight)


def test_update_needs_an_open_step(chunk: torch.nn.Module) -> None:
    optimizer = Optimizer(updated=True)
    training = set_up(chunk, optimizer)
    optimizer.step()
    assert training.module is not None and training.module.step == 0
    training.open_step(0.4, 8)
    for _ in range(2):
        optimizer.step()
    assert training.module.step == 1


@pytest.mark.parametrize("updated", [True, False])
def test_free_restores_model_and_optimizer(chunk: torch.nn.Module, updated: bool) -> None:
    before = set(chunk.state_dict())
    optimizer = Optimizer(updated)
    training = set_up(chunk, optimizer, last=True)
    assert set(chunk.state_dict()) - before == {
        f"let_projection_{name}" for name in ("weight", "exp_avg", "exp_avg_sq", "step")
    }
    training.open_step(0.4, 8)
    optimizer.step()
    assert training.module is None and set(chunk.state_dict()) == before
    assert "step" not in vars(optimizer)
    training.free()


def test_stage_without_layer_k_has_no_projection(chunk: torch.nn.Module) -> None:
    optimizer = Optimizer(updated=True)
    training = set_up(chunk, optimizer, layer=2)
    training.open_step(0.4, 8)
    assert training.module is None and "step" not in vars(optimizer)
    assert not any("projection" in name for name in chunk.state_dict())


def test_checkpoint_of_another_format_gives_new_projection(
    chunk: torch.nn.Module, tmp_path: Path
) -> None:
    lines: list[str] = []
    run = run_of(1, loaded_checkpoint=lambda: tmp_path, report=lines.append)
    training = ProjectionTraining(run, lambda: False)
    training.wrap_setup(lambda: ([chunk], Optimizer(True), None))()
    assert len(lines) == 1 and "newly initialised" in lines[0]
