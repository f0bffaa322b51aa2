"""Run the entry with a DeepSpeed engine whose optimizer does nothing: `-m tests.helpers.no_step`.

Megatron's DDP under ZeRO-1 behaves like this.
"""

from __future__ import annotations

import sys

from megatron_let import pretrain

if __name__ == "__main__":
    pretrain.prepare_process(pretrain.detect_host(), 0)
    import torch

    torch.optim.AdamW.step = lambda self, closure=None: None  # type: ignore[method-assign]
    sys.exit(pretrain.main())
