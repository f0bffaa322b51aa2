"""Are the nodes of a job fit to train? One process a rank, started as training is.

Each node's first rank looks at the node and writes `VERDICTS/NODE`: empty if all is well, else one
problem a line. Then all ranks compare versions and clocks and time an all-reduce together.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_let.doctor.machine import GIB, nvidia_smi, version_of

MAX_CLOCK_SKEW_SECONDS = 2.0
# The recipes are sized for GPUs of 80 GB, which show 79 GiB.
MIN_GPU_GIB = 75
_COMPARED = ("megatron-core", "torch", "triton", "transformer_engine", "nvidia-nccl-cu13")


def node_name() -> str:
    """Slurm's name of this node, which `--exclude` takes."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def node_problems(output: Path, gpus: int, min_free_gib: float) -> Iterator[str]:
    """What is wrong with this node by itself, one sentence each."""
    if gpus:
        yield from _gpu_problems(gpus)
    free = shutil.disk_usage(output).free / GIB
    if free < min_free_gib:
        yield f"{free:.1f} GiB free at {output}, {min_free_gib:g} needed for its checkpoints"
    try:
        probe = output / f".probe-{node_name()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        yield f"{output} cannot be written ({error.strerror})"


def _gpu_problems(expected: int) -> Iterator[str]:
    try:
        memory = [float(value) for value in nvidia_smi("memory.total")]
        used = [float(value) for value in nvidia_smi("memory.used")]
        errors = nvidia_smi("ecc.errors.uncorrected.volatile.total")
    except (OSError, subprocess.SubprocessError) as error:
        yield f"nvidia-smi fails ({error})"
        return
    if len(memory) != expected:
        yield f"{len(memory)} GPUs, {expected} expected"
    for index, mebibytes in enumerate(memory):
        if mebibytes / 1024 < MIN_GPU_GIB:
            yield f"GPU {index} has {mebibytes / 1024:.0f} GiB, {MIN_GPU_GIB} needed"
    for index, mebibytes in enumerate(used):
        # The ranks' own contexts take some hundred MiB.
        if mebibytes > 4096:
            yield f"GPU {index} holds {mebibytes / 1024:.0f} GiB of another process"
    for index, count in enumerate(errors):
        if count.isdigit() and int(count):
            yield f"GPU {index} counts {count} uncorrected ECC errors"
    yield from _xid_problems()


def _xid_problems() -> Iterator[str]:
    """Xid events of the kernel's log, where it may be read."""
    try:
        log = subprocess.run(["dmesg"], capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return
    # GPU off the bus, double-bit ECC, row remapping failure, contained and uncontained errors.
    for number in sorted(set(re.findall(r"NVRM: Xid .*?: (\d+),", log)) & {"48", "64", "79", "95"}):
        yield f"the kernel logged Xid {number} since the last boot"


def node_facts() -> dict[str, Any]:
    """What must be equal on all nodes, and the clock."""
    versions = {name: version_of(name) for name in _COMPARED}
    facts: dict[str, Any] = {"python": sys.version.split()[0], **versions}
    if torch.cuda.is_available():
        facts["driver"] = nvidia_smi("driver_version")[0]
    return facts


def outliers(facts: dict[str, dict[str, Any]], clocks: dict[str, float]) -> dict[str, list[str]]:
    """Nodes that differ from most others, and how.

    Args:
        facts: of each node.
        clocks: seconds since the epoch of each node, taken at the same moment.
    """
    found: dict[str, list[str]] = {}
    for name in next(iter(facts.values())):
        usual = Counter(node[name] for node in facts.values()).most_common(1)[0][0]
        for node, values in facts.items():
            if values[name] != usual:
                text = f"{name} is {values[name]}, {usual} on other nodes"
                found.setdefault(node, []).append(text)
    middle = sorted(clocks.values())[len(clocks) // 2]
    for node, seconds in clocks.items():
        if abs(seconds - middle) > MAX_CLOCK_SKEW_SECONDS:
            text = f"its clock is {seconds - middle:+.1f} s off"
            found.setdefault(node, []).append(text)
    return found


def bus_bandwidth(size_bytes: int, seconds: float, ranks: int) -> float:
    """GB/s each rank's link carries in an all-reduce, as nccl-tests count it."""
    return 2 * (ranks - 1) / ranks * size_bytes / seconds / 1e9


def _time_all_reduce(device: torch.device) -> float:
    size = 2**28 if device.type == "cuda" else 2**22
    buffer = torch.zeros(size, dtype=torch.uint8, device=device)
    rounds = 5
    for turn in range(rounds + 2):
        if turn == 2:
            dist.barrier()
            start = time.perf_counter()
        dist.all_reduce(buffer)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return bus_bandwidth(size, (time.perf_counter() - start) / rounds, dist.get_world_size())


def main(argv: list[str] | None = None) -> int:
    """Check this rank's node, then all nodes together; 0 if they are fit."""
    parser = argparse.ArgumentParser(prog="python -m megatron_let.doctor.nodes")
    parser.add_argument("--output", type=Path, required=True, help="the run's folder")
    parser.add_argument("--verdicts", type=Path, required=True, help="folder for one file a node")
    arguments = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    first_of_node = os.environ["LOCAL_RANK"] == "0"
    if first_of_node:
        gpus, disk = int(os.environ["LET_GPUS_PER_NODE"]), float(os.environ["LET_DISK_GIB"])
        problems = list(node_problems(arguments.output, gpus, disk))
        _write_verdict(arguments.verdicts, node_name(), problems)
    return 0 if _compare(arguments.verdicts) else 1


def _compare(verdicts: Path) -> bool:
    """Write what differs between nodes, and say whether the all-reduce is fast enough."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    dist.barrier()
    ours = (node_name(), node_facts(), time.time())
    theirs: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(theirs, ours)
    bandwidth = _time_all_reduce(device)
    fast_enough = bandwidth >= float(os.environ.get("LET_MIN_BUS_GBPS") or 0)
    if dist.get_rank() == 0:
        facts = {name: values for name, values, _ in theirs}
        clocks = {name: clock for name, _, clock in theirs}
        for node, problems in outliers(facts, clocks).items():
            _write_verdict(verdicts, node, problems)
        verdict = "" if fast_enough else f", LET_MIN_BUS_GBPS is {os.environ['LET_MIN_BUS_GBPS']}"
        ranks = f"{len(facts)} nodes, {len(theirs)} ranks"
        print(f"preflight: {ranks}, all-reduce {bandwidth:.2f} GB/s{verdict}")
    dist.barrier()
    dist.destroy_process_group()
    return fast_enough


def _write_verdict(folder: Path, node: str, problems: list[str]) -> None:
    with (folder / node).open("a") as stream:
        stream.writelines(f"{problem}\n" for problem in problems)


if __name__ == "__main__":
    sys.exit(main())
