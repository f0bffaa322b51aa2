"""Positions that a rank holds, compared with an independent formula."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_let.placement.sequence_shard import SequenceShard

sizes = st.integers(min_value=1, max_value=4)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[int, int, int]:
    """Draw (tokens, cp, sp) that divide."""
    cp, sp = draw(sizes), draw(sizes)
    chunks = 2 * cp if cp > 1 else 1
    # Tokens per rank need not be whole chunks: sp = 3 splits both chunks of a CP rank.
    unit = chunks * sp
    return unit * draw(st.integers(min_value=1, max_value=5)), cp, sp


def positions(shard: SequenceShard, length: int) -> list[int]:
    return [p for start, end in shard.ranges(length) for p in range(start, end)]


def independent_positions(length: int, shard: SequenceShard) -> list[int]:
    """Assign each position to a rank: chunk c of 2*cp belongs to rank min(c, 2*cp-1-c)."""

    def rank_of(position: int) -> int:
        if shard.cp_size == 1:
            return 0
        chunk = position * 2 * shard.cp_size // length
        return min(chunk, 2 * shard.cp_size - 1 - chunk)

    held = [p for p in range(length) if rank_of(p) == shard.cp_rank]
    local = len(held) // shard.sp_size
    return held[shard.sp_rank * local : (shard.sp_rank + 1) * local]


@given(layouts())
def test_ranges_of_all_ranks_partition_the_sequence(layout: tuple[int, int, int]) -> None:
    length, cp, sp = layout
    shards = [SequenceShard(cp, c, sp, s) for c in range(cp) for s in range(sp)]
    held = [positions(shard, length) for shard in shards]
    assert sorted(p for rank in held for p in rank) == list(range(length))
    assert {len(rank) for rank in held} == {length // cp // sp}


@given(layouts(), st.data())
def test_ranges_equal_independent_formula(
    layout: tuple[int, int, int], data: st.DataObject
) -> None:
    length, cp, sp = layout
    ranks = st.integers(0, cp - 1), st.integers(0, sp - 1)
    shard = SequenceShard(cp, data.draw(ranks[0]), sp, data.draw(ranks[1]))
    assert positions(shard, length) == independent_positions(length, shard)


@pytest.mark.parametrize(
    ("shard", "expected"),
    [
        (SequenceShard(), [(0, 8)]),
        (SequenceShard(sp_size=2, sp_rank=1), [(4, 8)]),
        (SequenceShard(cp_size=2, cp_rank=0), [(0, 2), (6, 8)]),
        (SequenceShard(cp_size=2, cp_rank=1), [(2, 4), (4, 6)]),
        (SequenceShard(2, 0, 2, 0), [(0, 2)]),
        (SequenceShard(2, 0, 2, 1), [(6, 8)]),
        (SequenceShard(2, 1, 4, 3), [(5, 6)]),
    ],
)
def test_ranges_of_eight_tokens_equal_values_by_hand(
    shard: SequenceShard, expected: list[tuple[int, int]]
) -> None:
    assert shard.ranges(8) == expected


@given(layouts(), st.data())
def test_slice_holds_ranges_and_no_other_memory(
    layout: tuple[int, int, int], data: st.DataObject
) -> None:
    length, cp, sp = layout
    shard = SequenceShard(
        cp, data.draw(st.integers(0, cp - 1)), sp, data.draw(st.integers(0, sp - 1))
    )
    states = torch.arange(length * 6.0).view(length, 2, 3)
    cut = shard.slice(states)
    assert torch.equal(cut, states[positions(shard, length)])
    # A view would keep the whole sequence alive.
    own = cut.untyped_storage().nbytes() == cut.numel() * cut.element_size()
    assert own, "the slice keeps the whole sequence alive"


def test_slice_whole_sequence_is_a_view() -> None:
    states = torch.zeros(8, 1, 2)
    assert SequenceShard().slice(states).data_ptr() == states.data_ptr()


@given(st.integers(1, 200), sizes, sizes)
def test_ranges_indivisible_sequence_raises(length: int, cp: int, sp: int) -> None:
    chunks = 2 * cp if cp > 1 else 1
    if length % chunks == 0 and (length // cp) % sp == 0:
        SequenceShard(cp, 0, sp, 0).ranges(length)
        return
    with pytest.raises(ValueError, match=f"sequence of {length} tokens .* change --seq-length"):
        SequenceShard(cp, 0, sp, 0).ranges(length)
