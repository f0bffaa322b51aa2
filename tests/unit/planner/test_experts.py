"""Mixtures of experts in the planner, by hand; test_estimate.py has Megatron under fake tensors."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_let.cli import plan
from megatron_let.planner.communication import expert_exchange, exposed_reduction
from megatron_let.planner.experts import expert_layer_bytes, expert_work_bytes
from megatron_let.planner.memory import Layout, stage_expert_params, stage_memory, stage_params
from megatron_let.planner.sizes import Experts, Gpu, TransformerSize

# 8 wide, 4 heads of 2 with 2 groups; 4 layers, each of 16 experts of 6 units, 3 of them per token,
# and a shared expert of 10 units.
EXPERTS = Experts(16, 3, 6, 10)
SIZE = TransformerSize(4, 8, 12, 4, 2, 2, True, 32, qk_norm=True, experts=EXPERTS)
LAYOUT = Layout(2, 2, 1, 8, 1, 3, 8, ep=4, etp=1)
GPU = Gpu(memory=2**34, flops=1e12, link=1e9, network=1e8, fp32_flops=1e11)
# Attention, three norms' weights, router and shared expert.
DENSE = 8 * 2 * 2 * (4 + 2) + 2 * 8 + 2 * 2 + 16 * 8 + 3 * 8 * 10
ONE_EXPERT = 3 * 8 * 6


def test_parameters_all_and_active() -> None:
    vocabulary = 2 * 32 * 8
    assert SIZE.num_params == 4 * (DENSE + 16 * ONE_EXPERT) + vocabulary
    assert SIZE.num_active_params == 4 * (DENSE + 3 * ONE_EXPERT) + vocabulary
    dense = replace(SIZE, experts=None)
    assert dense.num_params == dense.num_active_params == 4 * dense.layer_params + vocabulary


def test_flops_are_those_of_active_parameters() -> None:
    scores = 4 * 10 * 4 * 2
    assert SIZE.layer_forward_flops(10) == 2 * (DENSE + 3 * ONE_EXPERT) + scores


def test_experts_are_sharded_over_their_own_ranks() -> None:
    # Two layers on a stage; each rank has 4 whole experts, as 2 x 8 / 4 = 4 ranks do.
    assert stage_expert_params(SIZE, LAYOUT) == 2 * 4 * ONE_EXPERT
    assert LAYOUT.expert_dp == 4
    dense = stage_params(SIZE, LAYOUT, 0)
    assert dense == (2 * DENSE + 32 * 8) // 2
    found = stage_memory(SIZE, LAYOUT, 10, 0)
    assert found.params == 2 * (dense + 8 * ONE_EXPERT)
    assert found.optimizer == 12 * (dense // 8 + 8 * ONE_EXPERT // 4)
    # Split over TP as Megatron's default, a rank holds a half of each, as 2 ranks do.
    split = replace(LAYOUT, etp=None)
    assert (split.expert_tp, split.expert_dp) == (2, 2)
    assert stage_expert_params(SIZE, split) == 4 * ONE_EXPERT


def test_a_rank_keeps_the_tokens_routed_to_it() -> None:
    routed, products, router, shared = 3 * 8 * 2, 3 * 3 * 6 * 2, 16 * 21, 3 * 10 * 2
    assert (
        expert_layer_bytes(SIZE, EXPERTS, LAYOUT.tp, LAYOUT.expert_tp)
        == (routed + products + router) // 2 + shared // 2
    )
    # Both ranks of a split expert hold its tokens.
    split = replace(LAYOUT, etp=None)
    expected = (2 * routed + products + router) // 2 + shared // 2
    assert expert_layer_bytes(SIZE, EXPERTS, split.tp, split.expert_tp) == expected


def test_experts_forward_holds_copies_of_the_routed_tokens() -> None:
    routed = 3 * 8 * 2
    alone = replace(LAYOUT, tp=1, ep=1)
    assert expert_work_bytes(SIZE, EXPERTS, alone.tp, alone.ep, alone.expert_tp) == 3 * routed
    assert expert_work_bytes(SIZE, EXPERTS, alone.tp, 4, alone.expert_tp) == 4 * routed


def test_routed_tokens_cross_the_network_beyond_a_node() -> None:
    # 15 tokens on this rank, of which 3 in 4 belong to other ranks, there and back.
    sent = 2 * 3 * 15 * 8 * 2 * 3 / 4
    assert expert_exchange(SIZE, LAYOUT, 30, GPU) == pytest.approx(sent / 1e9)
    wide = replace(LAYOUT, ep=8)
    assert expert_exchange(SIZE, wide, 30, GPU) == pytest.approx(2 * 3 * 15 * 8 * 2 * 7 / 8 / 1e8)
    assert expert_exchange(replace(SIZE, experts=None), LAYOUT, 30, GPU) == 0


def test_reduction_of_experts_is_over_their_own_ranks() -> None:
    none = (0.0, 0.0)
    dense, experts = stage_params(SIZE, LAYOUT, 0), stage_expert_params(SIZE, LAYOUT)
    expected = 6 * (dense * 7 / 8 + experts * 3 / 4) / 1e8
    assert exposed_reduction(SIZE, LAYOUT, GPU, none, none) == pytest.approx(expected)


def test_recipe_is_planned_and_its_assumption_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(["--config", "let_moe_7b_a1b", "--gpus", "32", "--gpu", "a100-80g"]) == 0
    shown = capsys.readouterr().out
    assert "6.9B parameters, 1.3B active" in shown and "equally many tokens" in shown
