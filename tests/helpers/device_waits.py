"""Run the entry and print, for each step, whether pipeline communication waits for the device.

`-m tests.helpers.device_waits ARGS`, with the entry's arguments.
"""

from __future__ import annotations

import sys
from typing import Any

from megatron_let import pretrain


def print_waits() -> None:
    """Print `step N waits True|False` before each communication."""
    # The entry imports Megatron only after it has detected the host.
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
    from megatron.training import get_args

    original: Any = P2PCommunicator._communicate

    def communicate(self: Any, *args: Any, **kwargs: Any) -> Any:
        # One write: the ranks share the output.
        sys.stdout.write(f"step {get_args().curr_iteration} waits {self.config.batch_p2p_sync}\n")
        sys.stdout.flush()
        return original(self, *args, **kwargs)

    P2PCommunicator._communicate = communicate


if __name__ == "__main__":
    pretrain.prepare_process(pretrain.detect_host(), 0)
    print_waits()
    sys.exit(pretrain.main())
