"""The queue of a checkpoint writer's results."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import psutil
import pytest
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.storage import WriteResult

from megatron_let.compat.checkpoint_writer import results_queue

pytestmark = pytest.mark.medium


def test_process_of_the_queue_holds_results_without_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With torch each rank of a node would need 0.5 GB and seconds more."""
    script = ModuleType("__main__")
    script.__file__ = str(tmp_path / "script.py")
    (tmp_path / "script.py").write_text("import torch\n")
    monkeypatch.setitem(sys.modules, "__main__", script)
    monkeypatch.setattr(filesystem_async, "_results_queue", None)
    queue = results_queue()
    assert results_queue() is queue
    result = {0: [WriteResult(MetadataIndex("weight"), 3, None)]}
    queue.put(result)
    process = psutil.Process(queue._queue._manager._process.pid)
    assert not any("libtorch" in each.path for each in process.memory_maps())
    assert queue.get_nowait() == result
