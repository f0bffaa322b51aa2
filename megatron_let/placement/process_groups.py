"""Process groups of LET's own, beside those of Megatron with the same ranks."""

from __future__ import annotations

import torch


def new_group_of(ranks: list[int]) -> torch.distributed.ProcessGroup:
    """A new group of these global ranks; every rank of the job calls it, with its own group's.

    `new_group(use_local_synchronization=True)` would need no exchange, but it names groups by
    their ranks, and hangs where another one has had the same.
    """
    groups: list[list[int]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(groups, ranks)
    distinct = sorted(set(map(tuple, groups)))
    mine, _ = torch.distributed.new_subgroups_by_enumeration([list(group) for group in distinct])
    return mine
