"""Which positions a rank holds, against a formula of its own, and what its gradient counts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_let.placement.sequence_shard import (
    SequenceShard,
    gradient_denominator,
    per_token_gradient_factor,
)

sizes = st.integers(min_value=1, max_value=4)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[int, int, int]:
    """(tokens, cp, sp) that divide."""
    cp, sp = draw(sizes), draw(sizes)
    chunks = 2 * cp if cp > 1 else 1
    # Tokens for each rank need not be whole chunks: sp = 3 cuts through both of a CP rank's.
    unit = chunks * sp
    return unit * draw(st.integers(min_value=1, max_value=5)), cp, sp


def positions(shard: SequenceShard, length: int) -> list[int]:
    return [p for start, end in shard.ranges(length) for p in range(start, end)]


def independent_positions(length: int, shard: SequenceShard) -> list[int]:
    """Ask each position whose it is: chunk c of 2*cp belongs to rank min(c, 2*cp-1-c)."""

    def owner(position: int) -> int:
        if shard.cp_size == 1:
            return 0
        chunk = position * 2 * shard.cp_size // length
        return min(chunk, 2 * shard.cp_size - 1 - chunk)

    held = [p for p in range(length) if owner(p) == shard.cp_rank]
    local = len(held) // shard.sp_size
    return held[shard.sp_rank * local : (shard.sp_rank + 1) * local]


@given(layouts())
def test_shards_of_all_ranks_partition_the_sequence(layout: tuple[int, int, int]) -> None:
    length, cp, sp = layout
    shards = [SequenceShard(cp, c, sp, s) for c in range(cp) for s in range(sp)]
    held = [positions(shard, length) for shard in shards]
    assert sorted(p for rank in held for p in rank) == list(range(length))
    assert {len(rank) for rank in held} == {length // cp // sp}


@given(layouts(), st.data())
def test_ranges_are_those_of_an_independent_formula(
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
def test_ranges_of_eight_tokens(shard: SequenceShard, expected: list[tuple[int, int]]) -> None:
    assert shard.ranges(8) == expected


@given(layouts(), st.data())
def test_slice_takes_what_ranges_name(layout: tuple[int, int, int], data: st.DataObject) -> None:
    length, cp, sp = layout
    shard = SequenceShard(
        cp, data.draw(st.integers(0, cp - 1)), sp, data.draw(st.integers(0, sp - 1))
    )
    states = torch.arange(length * 6.0).view(length, 2, 3)
    cut = shard.slice(states)
    assert torch.equal(cut, states[positions(shard, length)])
    # A view would keep the whole sequence alive.
    own = cut.untyped_storage().nbytes() == cut.numel() * cut.element_size()
    assert own, "the slice holds on to the whole sequence"


def test_whole_sequence_is_not_copied() -> None:
    states = torch.zeros(8, 1, 2)
    assert SequenceShard().slice(states).data_ptr() == states.data_ptr()


@given(st.integers(1, 200), sizes, sizes)
def test_a_sequence_that_does_not_divide_is_refused(length: int, cp: int, sp: int) -> None:
    chunks = 2 * cp if cp > 1 else 1
    if length % chunks == 0 and (length // cp) % sp == 0:
        SequenceShard(cp, 0, sp, 0).ranges(length)
        return
    with pytest.raises(ValueError, match=f"sequence of {length} tokens .* change --seq-length"):
        SequenceShard(cp, 0, sp, 0).ranges(length)


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 3))
def test_denominator_gives_the_mean_over_the_global_batch(
    replicas: int, micro_batch_size: int, num_microbatches: int, cp: int
) -> None:
    """Megatron averages over DP x CP ranks what each of them gives."""
    length = 2 * cp * 3
    cosines = torch.rand(replicas, num_microbatches, length, micro_batch_size, dtype=torch.float64)
    denominator = gradient_denominator(micro_batch_size, length, cp, num_microbatches)
    contributions = [
        cosines[replica][:, positions(SequenceShard(cp, rank), length)].sum() / denominator
        for replica in range(replicas)
        for rank in range(cp)
    ]
    torch.testing.assert_close(torch.stack(contributions).mean(), cosines.mean())


def test_per_token_factor_undoes_megatrons_division_by_unmasked_tokens() -> None:
    cosines = torch.rand(32, dtype=torch.float64)
    factor = per_token_gradient_factor(unmasked_tokens=20, all_tokens=32)
    torch.testing.assert_close(cosines.sum() * factor / 20, cosines.mean())
