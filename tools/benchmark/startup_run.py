"""One rank of `startup.py`: the entry, which counts what each part of the start communicates.

    ... -m tools.benchmark.startup_run FOLDER [the entry's flags]

Writes FOLDER/rank_N.json: messages, bytes, groups, CPU seconds and seconds by part, up to the end
of the first step. A message is one call of a process group; its bytes are those of the tensors that
this rank gives for its result.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

REST = "Megatron: the rest"
# Part of the start: module, attribute.
PARTS = {
    "Megatron: process groups": ("megatron.training.initialize", "_initialize_distributed"),
    "agreement on settings": ("megatron_let.integration", "_is_same_on_all_ranks"),
    "teacher": ("megatron_let.methods.let_context", "_samples"),
    "group of states": ("megatron_let.placement.transfer", "Transfer.__init__"),
    "tokens": ("megatron_let.methods.global_batch", "TokenSharing.share"),
    "first step: the rest": ("megatron_let.methods.let", "LETMethod.run_with_teacher"),
}
CALLS = (
    "broadcast", "allreduce", "allreduce_coalesced", "reduce", "allgather", "_allgather_base",
    "allgather_into_tensor_coalesced", "gather", "scatter", "reduce_scatter",
    "_reduce_scatter_base", "reduce_scatter_tensor_coalesced", "alltoall", "alltoall_base",
    "send", "recv", "barrier",
)  # fmt: skip


class Recorder:
    """Adds messages and time to the innermost part that runs."""

    def __init__(self) -> None:
        self.parts: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        self._part, self._since = REST, _clock()

    def add(self, name: str, value: float) -> None:
        """Add to a value of the running part."""
        self.parts[self._part][name] += value

    def enter(self, part: str) -> str:
        """Begin a part; return the one that it interrupts."""
        now = _clock()
        for name, start, end in zip(("cpu", "wall"), self._since, now, strict=True):
            self.add(name, end - start)
        interrupted, self._part, self._since = self._part, part, now
        return interrupted


def _clock() -> tuple[float, float]:
    used = os.times()
    return used.user + used.system, time.perf_counter()


def main() -> int:
    """Run the entry with the rest of the command line."""
    folder, recorder = Path(sys.argv[1]), Recorder()
    # The entry imports Megatron only after it has detected the host; the parent has done both.
    from megatron_let import pretrain

    for part, target in PARTS.items():
        _watch(part, *target, recorder)
    for call in CALLS:
        _count_messages(call, recorder)
    for module in (dist, dist.distributed_c10d):
        _count_groups(module, recorder)
    code = pretrain.main(sys.argv[2:])
    recorder.parts.pop("after", None)
    rank = int(os.environ["RANK"])
    (folder / f"rank_{rank}.json").write_text(json.dumps(recorder.parts))
    return code


def _watch(part: str, module: str, path: str, recorder: Recorder) -> None:
    """Attribute to a part what runs inside a function."""
    *classes, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for each in classes:
        owner = getattr(owner, each)
    function = getattr(owner, name)
    ends_start = part == "first step: the rest"

    @functools.wraps(function)
    def watched(*args: Any, **kwargs: Any) -> Any:
        before = recorder.enter(part)
        try:
            return function(*args, **kwargs)
        finally:
            recorder.enter("after" if ends_start else before)

    setattr(owner, name, watched)


def _count_messages(name: str, recorder: Recorder) -> None:
    function = getattr(dist.ProcessGroup, name)

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        recorder.add("messages", 1)
        recorder.add("bytes", _num_bytes(args[:1]))
        return function(self, *args, **kwargs)

    setattr(dist.ProcessGroup, name, counted)


def _num_bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.nbytes
    return sum(map(_num_bytes, value)) if isinstance(value, list | tuple) else 0


def _count_groups(module: Any, recorder: Recorder) -> None:
    create: Callable[..., Any] = module.new_group

    @functools.wraps(create)
    def counted(*args: Any, **kwargs: Any) -> Any:
        recorder.add("groups", 1)
        return create(*args, **kwargs)

    module.new_group = counted


if __name__ == "__main__":
    sys.exit(main())
