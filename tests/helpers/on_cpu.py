"""Run a Megatron script as `__main__` on this host: `-m tests.helpers.on_cpu SCRIPT ARGS`.

A user's script expects GPUs; without one it needs the CPU shims and flags before it starts.
"""

from __future__ import annotations

import os
import runpy
import sys

from megatron_let.compat.device import detect_host, prepare_process

if __name__ == "__main__":
    host = detect_host()
    prepare_process(host, int(os.environ["RANK"]))
    from megatron_let.compat.apply import apply_host_patches

    apply_host_patches(host)
    script, *arguments = sys.argv[1:]
    flags = host.argv()
    if "--reset-attention-mask" in arguments:
        # Megatron has no flag that turns its default on again.
        flags.remove("--no-create-attention-mask-in-dataloader")
    sys.argv = [script, *flags, *arguments]
    runpy.run_path(script, run_name="__main__")
