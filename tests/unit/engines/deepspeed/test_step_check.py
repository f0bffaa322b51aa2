"""The check that every step trains."""

from __future__ import annotations

import pytest
import torch

from megatron_let.engines.deepspeed.step_check import StepCheck, checksums
from megatron_let.errors import LETError


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2).bfloat16())


def change_last_bit(module: torch.nn.Module) -> None:
    weight = module[1].weight.data  # type: ignore[index]
    weight.view(torch.int16)[0, 0] += 1


def test_checksums_change_with_one_bit_of_one_weight() -> None:
    module = model()
    before = checksums(module)
    assert checksums(module) == before and len(before) == 4
    change_last_bit(module)
    assert checksums(module) != before


def test_unchanged_weights_are_an_error_at_the_first_step_with_a_learning_rate() -> None:
    check = StepCheck(model())
    check.before_step(0.0)
    check.after_step(1.0)
    check.before_step(1e-3)
    with pytest.raises(LETError, match=r"No weight changed .* gradient norm is 1\.5"):
        check.after_step(1.5)


def test_weights_are_not_compared_after_the_first_change() -> None:
    module = model()
    check = StepCheck(module)
    check.before_step(1e-3)
    change_last_bit(module)
    check.after_step(1.0)
    check.before_step(1e-3)
    check.after_step(0.0)


def test_zero_gradient_norm_is_an_error_in_a_warm_up() -> None:
    check = StepCheck(model())
    check.before_step(0.0)
    with pytest.raises(LETError, match="gradient norm is 0"):
        check.after_step(0.0)


@pytest.mark.parametrize("norm", [float("nan"), float("inf")])
def test_non_finite_norm_is_an_error_at_any_step(norm: float) -> None:
    module = model()
    check = StepCheck(module)
    check.before_step(1e-3)
    change_last_bit(module)
    check.after_step(1.0)
    check.before_step(1e-3)
    with pytest.raises(LETError, match=f"gradient norm is {norm}"):
        check.after_step(norm)
