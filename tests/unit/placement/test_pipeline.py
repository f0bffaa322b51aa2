"""Order of the pipeline passes, compared with Megatron's functions."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches

from megatron_let.placement.pipeline import Pass, Pipeline

PIPELINES = [
    Pipeline(1, 4), Pipeline(2, 4), Pipeline(4, 2), Pipeline(4, 16),
    Pipeline(2, 4, num_chunks=2), Pipeline(4, 8, num_chunks=3), Pipeline(4, 10, 2, group_size=5),
]  # fmt: skip


@pytest.mark.parametrize("pipeline", [p for p in PIPELINES if p.num_stages > 1])
def test_num_warmup_equals_megatrons(pipeline: Pipeline) -> None:
    for stage in range(pipeline.num_stages):
        communicator = SimpleNamespace(
            pp_group=SimpleNamespace(size=lambda: pipeline.num_stages, rank=lambda s=stage: s),
            virtual_pipeline_model_parallel_size=(
                pipeline.num_chunks if pipeline.num_chunks > 1 else None
            ),
        )
        _, _, warmup, _ = get_pp_rank_microbatches(
            pipeline.num_microbatches,
            pipeline.num_chunks,
            pipeline.group,
            p2p_communicator=communicator,
        )
        assert pipeline.num_warmup(stage) == warmup


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_passes_run_once_and_after_their_inputs(pipeline: Pipeline) -> None:
    expected = {
        Pass(kind, microbatch, chunk)
        for kind in ("forward", "backward")
        for microbatch in range(pipeline.num_microbatches)
        for chunk in range(pipeline.num_chunks)
    }
    for stage in range(pipeline.num_stages):
        passes = pipeline.passes(stage)
        assert len(passes) == len(expected) and set(passes) == expected
        for work in passes:
            before = passes[: passes.index(work)]
            producer = pipeline.producer(work, stage)
            assert producer is None or producer[0] != stage or producer[1] in before


def test_passes_first_of_two_stages_follow_1f1b() -> None:
    order = [f"{p.kind[0]}{p.microbatch}" for p in Pipeline(2, 3).passes(0)]
    assert order == ["f0", "f1", "b0", "f2", "b1", "b2"]
    assert Pipeline(2, 3).num_forwards_to_wait(0) == 2


def test_producer_of_interleaved_chunk_wraps_around_the_pipeline() -> None:
    pipeline = Pipeline(2, 4, num_chunks=2)
    assert pipeline.producer(Pass("forward", 3, 1), 0) == (1, Pass("forward", 3, 0))
    assert pipeline.producer(Pass("backward", 3, 0), 1) == (0, Pass("backward", 3, 1))
    assert pipeline.producer(Pass("backward", 3, 1), 1) == (1, Pass("forward", 3, 1))
    assert pipeline.producer(Pass("forward", 3, 0), 0) is None


def test_num_forwards_to_wait_without_overlap_is_one_less() -> None:
    assert Pipeline(2, 4, 2).num_forwards_to_wait(0) == 5
    assert Pipeline(2, 4, 2, overlap_p2p=False).num_forwards_to_wait(0) == 4


@pytest.mark.parametrize(
    ("pipeline", "stage", "chunk", "number"),
    [
        (Pipeline(4, 16), 0, 0, 4),
        (Pipeline(4, 16), 3, 0, 1),
        (Pipeline(4, 2), 0, 0, 2),
        # Two groups of p microbatches, whatever the number of chunks.
        (Pipeline(8, 32, 5), 0, 0, 16),
        (Pipeline(2, 32, 4), 0, 0, 4),
    ],
)
def test_microbatches_in_flight(pipeline: Pipeline, stage: int, chunk: int, number: int) -> None:
    assert pipeline.num_in_flight(stage, chunk) == number
