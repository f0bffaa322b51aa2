"""Run the entry where importing DeepSpeed fails: `-m tests.helpers.without_deepspeed ARGS`."""

from __future__ import annotations

import sys

from megatron_let import pretrain

if __name__ == "__main__":
    sys.modules["deepspeed"] = None  # type: ignore[assignment]
    sys.exit(pretrain.main())
