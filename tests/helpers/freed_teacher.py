"""Run the entry and fail unless the teacher is freed from memory at S_stop, or at n_KD.

It must be free when its method has released it, without garbage collection. This includes its
output layer, and a learned projection with the state of its optimizer.

`-m tests.helpers.freed_teacher ARGS`, with the entry's arguments.
"""

from __future__ import annotations

import gc
import sys
import weakref
from typing import Any

from megatron_let import pretrain

if __name__ == "__main__":
    gc.disable()
    references: list[Any] = []
    checked: list[bool] = []
    # DeepSpeed keeps the modules of a sharded model; their weights must be freed.
    shards: list[Any] = []

    # The entry imports Megatron only after it has detected the host.
    def _watch() -> None:
        from megatron_let.methods import distillation, learned_projection, let, let_context

        load, load_with_head = let_context.load_teacher, distillation.load_teacher_with_head
        make = learned_projection.LearnedProjection

        def watched(*args: Any, **kwargs: Any) -> Any:
            teacher = load(*args, **kwargs)
            references.append(weakref.ref(teacher))
            shards.extend(p for p in teacher._model.parameters() if hasattr(p, "ds_tensor"))
            if not shards:
                references.append(weakref.ref(teacher._model))
            return teacher

        def watched_with_head(*args: Any, **kwargs: Any) -> Any:
            teacher, head = load_with_head(*args, **kwargs)
            references.extend(weakref.ref(x) for x in (teacher, teacher._model, head, head.weight))
            return teacher, head

        def watched_projection(*args: Any, **kwargs: Any) -> Any:
            module = make(*args, **kwargs)
            references.extend(weakref.ref(x) for x in (module, *module.buffers()))
            return module

        def watched_release(release: Any) -> Any:
            def release_and_check(self: Any) -> bool:
                released = release(self)
                alive = [reference() for reference in references]
                assert not any(x is not None for x in alive), "the teacher is still in memory"
                checked.append(released)
                return released

            return release_and_check

        for method in (let.LETMethod, distillation.DistillationMethod):
            method.release = watched_release(method.release)
        let_context.load_teacher = watched
        distillation.load_teacher_with_head = watched_with_head
        learned_projection.LearnedProjection = watched_projection

    host = pretrain.detect_host()
    pretrain.prepare_process(host, 0)
    _watch()
    assert pretrain.main() == 0
    assert references, "no teacher was loaded"
    assert bool(shards) == ("--let-teacher-shard" in sys.argv), (
        "the teacher is sharded if and only if requested"
    )
    assert any(checked), "no teacher was released"
    assert not any(shard.numel() or shard.ds_tensor.numel() for shard in shards), "shards are left"
    sys.exit(0)
