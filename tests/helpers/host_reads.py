"""Find operations that copy a value to the host, which on a GPU waits for the device.

`-m tests.helpers.host_reads ARGS`, with the entry's arguments: run it and fail if the package or
transformers reads the device between the beginning of a global batch and the end of its schedule.
"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import Any, Self

from torch.utils._python_dispatch import TorchDispatchMode

from megatron_let import pretrain

READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero")
READS += ("aten::masked_select", "aten::unique", "aten::_unique2", "aten::repeat_interleave.Tensor")


class HostReads(TorchDispatchMode):
    """Records each read with the innermost frame of a package that asked for it.

    Attributes:
        found: (package, operator, file and line) of each read.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str, str]] = []

    def __enter__(self) -> Self:
        super().__enter__()
        return self

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function.name() in READS:
            package, line = _caller()
            self.found.append((package, function.name(), line))
        return function(*args, **kwargs or {})


def _caller() -> tuple[str, str]:
    for frame in reversed(traceback.extract_stack()[:-2]):
        # The CPU shims are on the stack of every operation.
        if frame.filename.endswith("cpu_shims.py"):
            continue
        for package in ("megatron_let", "transformers", "megatron"):
            if package in Path(frame.filename).parts:
                return package, f"{frame.filename}:{frame.lineno}"
    return "", ""


if __name__ == "__main__":
    pretrain.prepare_process(pretrain.detect_host(), 0)
    from megatron_let.methods.let import LETMethod
    from megatron_let.methods.let_context import LETContext

    reads = HostReads()
    begin, close = LETContext.begin, LETMethod._close
    batches = 0

    def watched_begin(*args: Any) -> Any:
        reads.__enter__()
        return begin(*args)

    def watched_close(*args: Any) -> Any:
        global batches
        reads.__exit__(None, None, None)
        batches += 1
        return close(*args)

    LETContext.begin, LETMethod._close = watched_begin, watched_close  # type: ignore[method-assign]
    assert pretrain.main() == 0
    assert batches > 0, "no batch had a teacher"
    ours = [read for read in reads.found if read[0] != "megatron"]
    assert not ours, f"the device is read: {ours}"
    sys.exit(0)
