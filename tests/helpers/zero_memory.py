"""Run the entry on DeepSpeed's engine and record the bytes of all tensors in the optimizer's step.

`-m tests.helpers.zero_memory ARGS`, with the entry's arguments; `$MEASURED` names the JSON file.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from megatron_let import pretrain


def tensor_bytes() -> int:
    """Return the bytes of all tensors in this process, counting each storage once."""
    storages = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for found in gc.get_objects():
            if isinstance(found, torch.Tensor) and not found.is_meta:
                storage = found.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _watch(measured: dict[str, int]) -> None:
    import deepspeed

    initialize = deepspeed.initialize

    def watched(*args: Any, **kwargs: Any) -> Any:
        engine, *rest = initialize(*args, **kwargs)
        optimizer = engine.optimizer.optimizer
        step = optimizer.step

        def measured_step(*args: Any, **kwargs: Any) -> Any:
            result = step(*args, **kwargs)
            # After the update of the last group, while its gradients still exist.
            measured["at_step"] = max(measured.get("at_step", 0), tensor_bytes())
            return result

        optimizer.step = measured_step
        return engine, *rest

    deepspeed.initialize = watched


if __name__ == "__main__":
    host = pretrain.detect_host()
    pretrain.prepare_process(host, 0)
    found: dict[str, int] = {}
    _watch(found)
    assert pretrain.main() == 0
    if os.environ["RANK"] == "0":
        Path(os.environ["MEASURED"]).write_text(json.dumps(found))
    sys.exit(0)
