"""Process groups of this package, separate from those of Megatron with the same ranks."""

from __future__ import annotations

import torch


def new_group_of(ranks: list[int]) -> torch.distributed.ProcessGroup:
    """Create a process group of these global ranks.

    Every rank of the job calls it with the ranks of its own group. (With
    `new_group(use_local_synchronization=True)` no exchange would be needed, but it names groups by
    their ranks and hangs if another group with the same ranks exists.)
    """
    groups: list[list[int]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(groups, ranks)
    distinct = sorted(set(map(tuple, groups)))
    mine, _ = torch.distributed.new_subgroups_by_enumeration([list(group) for group in distinct])
    return mine
