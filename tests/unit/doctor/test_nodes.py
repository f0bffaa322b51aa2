"""Comparison of the nodes of a job."""

from __future__ import annotations

import pytest

from megatron_let.doctor import nodes

FACTS = {f"n{i}": {"torch": "2.13", "driver": "580"} for i in range(1, 5)}


def test_equal_nodes_have_no_outliers() -> None:
    assert nodes.outliers(FACTS, dict.fromkeys(FACTS, 100.0)) == {}


def test_different_version_and_wrong_clock_are_reported() -> None:
    facts = FACTS | {"n3": {"torch": "2.12", "driver": "580"}}
    clocks = dict.fromkeys(FACTS, 100.0) | {"n2": 107.0}
    assert nodes.outliers(facts, clocks) == {
        "n3": ["torch is 2.12, 2.13 on other nodes"],
        "n2": ["its clock is +7.0 s off"],
    }


def test_bus_bandwidth_equals_nccl_tests() -> None:
    assert nodes.bus_bandwidth(10**9, 0.01, 32) == pytest.approx(2 * 31 / 32 * 100)
