"""Communication, teacher group, failures and cost of large runs, against figures by hand."""

from __future__ import annotations

import csv
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_let.cli import plan
from megatron_let.planner.break_even import RunCost
from megatron_let.planner.communication import (
    activation_transfer,
    exposed_reduction,
    layer_exchange,
    state_transfer,
)
from megatron_let.planner.estimate import Request
from megatron_let.planner.failures import checkpoint_interval, interruption_seconds, useful_share
from megatron_let.planner.memory import Layout
from megatron_let.planner.sizes import GPUS, TEACHERS, Gpu, TransformerSize
from megatron_let.planner.teacher_group import teacher_group
from tests.helpers.runs import ROOT
from tools.benchmark import scale

pytestmark = pytest.mark.medium

GPU = Gpu(memory=2**34, flops=1e12, link=1e9, network=1e8, fp32_flops=1e11)
# 8 wide, 4 heads of 2 with 2 groups, 12 MLP units, 4 layers.
SIZE = TransformerSize(4, 8, 12, 4, 2, 2, True, 32)
LAYOUT = Layout(tp=2, pp=2, cp=1, dp=4, num_chunks=1, micro_batch_size=3, num_microbatches=8)


def test_tensor_parallel_layer_moves_four_halves_of_the_activation() -> None:
    # 3 x 10 tokens x 8 x 2 bytes, four times, half of it to the other rank.
    assert layer_exchange(SIZE, LAYOUT, 10, GPU) == pytest.approx(4 * 480 / 2 / 1e9)
    alone = replace(LAYOUT, tp=1)
    assert layer_exchange(SIZE, alone, 10, GPU) == 0


def test_context_parallel_layer_gathers_keys_and_values() -> None:
    layout = replace(LAYOUT, tp=1, cp=2)
    # 3 x 5 tokens, 2 x 2 heads of 2, 2 bytes, from one other rank of the node.
    assert layer_exchange(SIZE, layout, 10, GPU) == pytest.approx(15 * 8 * 2 / 1e9)
    # 16 ranks are on two nodes.
    layout = replace(LAYOUT, tp=1, cp=16)
    tokens = 3 * 10 / 16
    assert layer_exchange(SIZE, layout, 10, GPU) == pytest.approx(15 * tokens * 8 * 2 / 1e8)


def test_transfers_carry_this_ranks_share_of_the_sequence() -> None:
    assert activation_transfer(SIZE, LAYOUT, 10, GPU) == pytest.approx(480 / 2 / 1e8)
    teacher = replace(SIZE, hidden_size=6)
    assert state_transfer(teacher, LAYOUT, 10, GPU) == pytest.approx(3 * 5 * 6 * 2 / 1e8)
    one_stage = replace(LAYOUT, pp=1)
    assert activation_transfer(SIZE, one_stage, 10, GPU) == 0
    assert state_transfer(teacher, one_stage, 10, GPU) == 0
    assert state_transfer(None, LAYOUT, 10, GPU) == 0


@pytest.mark.parametrize(
    ("dp", "forward", "backward", "share"),
    [
        # Both hidden; the gather exposed; the reduction exposed; both; one replica.
        (4, 1.0, 1.0, 0.0),
        (4, 0.0, 1.0, 2 * 3 / 4),
        (4, 1.0, 0.0, 4 * 3 / 4),
        (4, 0.0, 0.0, 6 * 3 / 4),
        (1, 0.0, 0.0, 0.0),
    ],
)
def test_exposed_reduction_is_what_exceeds_the_passes(
    dp: int, forward: float, backward: float, share: float
) -> None:
    params = (2 * (8 * 2 * 2 * (4 + 2) + 3 * 8 * 12 + 16) + 32 * 8) // 2
    found = exposed_reduction(SIZE, replace(LAYOUT, dp=dp), GPU, (forward,) * 2, (backward,) * 2)
    assert found == pytest.approx(params * share / 1e8)


def test_teacher_group_is_the_fewest_nodes_that_keep_up() -> None:
    request = Request(SIZE, SIZE, 1, 10, GPU, efficiency=0.5)
    flops = 3 * 8 * 4 * 10 * SIZE.forward_flops(10, logits=False)
    # On one rank the teacher takes 9 steps: two nodes of 8 ranks beside 16 ranks.
    found = teacher_group(request, LAYOUT, flops / 5e11 / 9)
    assert (found.num_ranks, found.cost_ratio) == (16, 2.0)
    assert teacher_group(request, LAYOUT, flops / 5e11 / 8).num_ranks == 8


# Failures


@pytest.mark.parametrize("save", [1.0, 10.0, 100.0])
@pytest.mark.parametrize("between", [1e3, 1e5])
def test_interval_has_the_largest_useful_share(save: float, between: float) -> None:
    best = checkpoint_interval(save, between)
    share = useful_share(best, save, 60, between)
    others = (useful_share(best * f, save, 60, between) for f in (0.5, 0.8, 1.25, 2))
    assert all(share > other for other in others)
    # Young's first-order value, from which it differs by about the save time.
    assert best == pytest.approx((2 * save * between) ** 0.5, abs=1.1 * save)


def test_useful_share_equals_a_simulation() -> None:
    save, restart, between, interval = 20.0, 50.0, 1000.0, 180.0
    draw = random.Random(0)
    elapsed, next_failure = 0.0, draw.expovariate(1 / between)
    for _ in range(20_000):
        while next_failure < elapsed + interval + save:
            elapsed = next_failure
            next_failure += draw.expovariate(1 / between)
            # A restart may be interrupted too.
            while next_failure < elapsed + restart:
                elapsed = next_failure
                next_failure += draw.expovariate(1 / between)
            elapsed += restart
        elapsed += interval + save
    expected = 20_000 * interval / elapsed
    assert useful_share(interval, save, restart, between) == pytest.approx(expected, rel=0.01)


def test_llama_3_was_interrupted_every_three_hours() -> None:
    rate = 419 / (54 * 24 * 16384)
    assert interruption_seconds(rate, 16384) / 3600 == pytest.approx(54 * 24 / 419)


def test_saves_longer_than_the_time_between_interruptions_use_that_time() -> None:
    assert checkpoint_interval(100, 50) == 50


# Cost


@pytest.mark.parametrize(
    ("speedup", "ratio", "hours"),
    [
        (1.0, 1.0, 1000),
        (1.0, 1.5, 1100),
        (2.0, 1.5, 600),
        # Fewer steps than the teacher's 200: it runs in all of them.
        (10.0, 1.5, 150),
    ],
)
def test_let_gpu_hours(speedup: float, ratio: float, hours: float) -> None:
    cost = RunCost(1000, 1e12, 0.2, {})
    assert cost.let_gpu_hours(speedup, ratio) == pytest.approx(hours)


@pytest.mark.parametrize("ratio", [1.0, 1.02, 2.0, 4.5, 20.0])
def test_break_even_takes_the_baselines_gpu_hours(ratio: float) -> None:
    cost = RunCost(1000, 1e12, 0.2, {})
    assert cost.let_gpu_hours(cost.break_even(ratio), ratio) == pytest.approx(1000)


def test_break_even_prints_hours_and_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cost.svg"
    argv = ["--config", str(ROOT / "configs/let_7b.yaml"), "--gpus", "32", "--gpu", "a100-80g"]
    assert plan.main([*argv, "--break-even", str(path)]) == 0
    text = capsys.readouterr().out
    assert "teacher in 19.7% of its steps" in text and "1.25e+10" in text
    assert "<svg" in path.read_text()


def test_break_even_is_part_of_the_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "cost.pdf"
    argv = ["--config", "let_7b", "--gpus", "32", "--gpu", "a100-80g", "--json"]
    assert plan.main([*argv, "--break-even", str(path)]) == 0
    found = json.loads(capsys.readouterr().out)
    cost = found["break_even"]
    assert cost["gpu_hours"] == pytest.approx(7629 * found["baseline_seconds"] * 32 / 3600)
    assert cost["ratios"]["bubble"] == found["ratio"]["bubble"]
    assert cost["let_gpu_hours"]["bubble"]["1.6"] < cost["gpu_hours"]
    assert cost["break_even_speedup"]["bubble"] >= 1
    assert path.is_file()


def test_break_even_takes_the_default_stop_step(tmp_path: Path) -> None:
    argv = ["--config", "baseline_7b", "--gpus", "32", "--gpu", "a100-80g", "--let-method", "let"]
    path = tmp_path / "cost.svg"
    assert plan.main([*argv, "--teacher", "smollm2-1.7b", "--break-even", str(path)]) == 0
    assert path.is_file()


def test_break_even_without_a_teacher_returns_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--config", "baseline_7b", "--gpus", "32", "--gpu", "h100-80g"]
    assert plan.main([*argv, "--break-even", str(tmp_path / "cost.svg")]) == 2
    assert "--let-method let" in capsys.readouterr().err


def test_first_row_of_the_step_table_is_reproduced() -> None:
    row = next(iter(scale.step_rows()))
    recorded = next(csv.DictReader(scale.RESULTS.open(newline="")))
    assert {name: str(value) for name, value in row.items()}.items() <= recorded.items()


def test_llama_3_1_8b_has_its_published_parameters() -> None:
    size = TEACHERS["llama-3.1-8b"]
    total = size.num_layers * size.layer_params + 2 * size.embedding_params + size.hidden_size
    assert total == 8_030_261_248 and GPUS["h100-80g"].flops == 989e12
