"""Count live bytes under fake tensors, which have no allocator to query."""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """Bytes of the live storages that operators have returned, and their peak.

    `torch.distributed._tools.mem_tracker.MemTracker` counts the same, but fails on Megatron's DDP
    (whose `buffers` is a list) and on parameters without gradients.
    """

    def __init__(self) -> None:
        super().__init__()
        self._known: set[int] = set()
        self.bytes = 0
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operator and count the storages that it returned."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return result

    def reset_peak(self) -> None:
        """Reset the peak to the current number of bytes."""
        self.peak = self.bytes

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.bytes += size
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.bytes -= size
