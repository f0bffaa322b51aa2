"""Run the entry and fail unless the teacher has left the memory after S_stop.

`-m tests.helpers.freed_teacher ARGS`, with the entry's arguments.
"""

from __future__ import annotations

import sys
import weakref
from typing import Any

from megatron_let import pretrain

if __name__ == "__main__":
    references: list[Any] = []
    # DeepSpeed keeps a sharded model's modules; their weights must go.
    shards: list[Any] = []

    # The entry imports Megatron itself, after it has looked at the host.
    def _watch() -> None:
        from megatron_let import attachment

        load = attachment.load_teacher

        def watched(*args: Any, **kwargs: Any) -> Any:
            teacher = load(*args, **kwargs)
            references.append(weakref.ref(teacher))
            shards.extend(p for p in teacher._model.parameters() if hasattr(p, "ds_tensor"))
            if not shards:
                references.append(weakref.ref(teacher._model))
            return teacher

        attachment.load_teacher = watched

    host = pretrain.detect_host()
    pretrain.prepare_process(host, 0)
    _watch()
    assert pretrain.main() == 0
    assert references, "no teacher was loaded"
    assert bool(shards) == ("--let-teacher-shard" in sys.argv), "sharded, or not, unasked"
    assert all(reference() is None for reference in references), "the teacher is still in memory"
    assert not any(shard.numel() or shard.ds_tensor.numel() for shard in shards), "shards are left"
    sys.exit(0)
