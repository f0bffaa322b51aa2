"""Check one node of a job before training; one process per node.

Writes `VERDICTS/NODE`: empty if the node is fit, else one problem per line.
"""

import argparse
import os
import re
import shutil
import socket
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

from megatron_let.compat.device import detect_host, prepare_process
from megatron_let.doctor.check import GIB, nvidia_smi
from megatron_let.doctor.machine import check_machine

# More is another training process; a node's services take some hundred MiB.
MAX_USED_MIB = 4096
# Double-bit ECC error, row remapping failure, GPU off the bus, uncontained error.
_FATAL_XIDS = {"48", "64", "79", "95"}


def node_name() -> str:
    """Return Slurm's name of this node, as `--exclude` takes it."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def write_verdict(folder: Path, node: str, problems: list[str]) -> None:
    """Append problems to a node's file; without problems, create it empty."""
    with (folder / node).open("a") as stream:
        stream.writelines(f"{problem}\n" for problem in problems)


def node_problems(
    output: Path, gpus: int, min_gpu_gib: float, min_free_gib: float
) -> Iterator[str]:
    """Yield the problems of `gpus` GPUs (0 skips them) and of the disk, one sentence each."""
    if gpus:
        yield from _gpu_problems(gpus, min_gpu_gib)
    free = shutil.disk_usage(output).free / GIB
    if free < min_free_gib:
        yield f"{free:.1f} GiB free at {output}, {min_free_gib:g} needed for its checkpoints"
    try:
        probe = output / f".probe-{node_name()}"
        probe.write_text("\n")
        probe.unlink()
    except OSError as error:
        yield f"{output} cannot be written ({error.strerror})"


def _gpu_problems(expected: int, min_gib: float) -> Iterator[str]:
    try:
        memory = [float(value) for value in nvidia_smi("memory.total")]
        used = [float(value) for value in nvidia_smi("memory.used")]
        errors = nvidia_smi("ecc.errors.uncorrected.volatile.total")
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        yield f"nvidia-smi fails ({error})"
        return
    if len(memory) != expected:
        yield f"{len(memory)} GPUs, {expected} expected"
    for index, mebibytes in enumerate(memory):
        if mebibytes / 1024 < min_gib:
            yield f"GPU {index} has {mebibytes / 1024:.0f} GiB, {min_gib:g} needed"
    for index, mebibytes in enumerate(used):
        if mebibytes > MAX_USED_MIB:
            yield f"GPU {index} holds {mebibytes / 1024:.0f} GiB of another process"
    for index, count in enumerate(errors):
        if count.isdigit() and int(count):
            yield f"GPU {index} counts {count} uncorrected ECC errors"
    yield from _xid_problems()


def _xid_problems() -> Iterator[str]:
    """Yield fatal Xid events of the kernel's log, if it may be read."""
    try:
        log = subprocess.run(["dmesg"], capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return
    for number in sorted(set(re.findall(r"NVRM: Xid .*?: (\d+),", log)) & _FATAL_XIDS):
        yield f"the kernel logged Xid {number} since the last boot"


def doctor_problems() -> Iterator[str]:
    """Yield the failed checks of the machine."""
    host = detect_host()
    prepare_process(host, 0)
    for check in check_machine(host):
        if not check.ok:
            yield f"{check.name}: {check.found}; {check.path}"


def main(argv: list[str] | None = None) -> int:
    """Write this node's verdict; return 0 if it is fit."""
    parser = argparse.ArgumentParser(prog="python -m megatron_let.doctor.node")
    parser.add_argument("--output", type=Path, required=True, help="the run's folder")
    parser.add_argument("--verdicts", type=Path, required=True, help="folder for one file per node")
    arguments = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    names = ("LET_GPUS_PER_NODE", "LET_GPU_GIB", "LET_DISK_GIB")
    gpus, memory, disk = (int(os.environ[name]) for name in names)
    problems = [*node_problems(arguments.output, gpus, memory, disk), *doctor_problems()]
    write_verdict(arguments.verdicts, node_name(), problems)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
