"""Check that the nodes of a job can train together; one process per rank, as in training.

All ranks compare versions and clocks and time an all-reduce; a node that differs gets a line in its
verdict file.
"""

import argparse
import os
import statistics
import sys
import time
import warnings
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_let.doctor.check import driver_versions, version_of
from megatron_let.doctor.node import node_name, write_verdict

# Exit code for a slow all-reduce; the launcher uses the same for unfit nodes.
TOO_SLOW = 3
MAX_CLOCK_SKEW_SECONDS = 2.0
_COMPARED = ("megatron-core", "megatron_let", "torch", "triton", "transformer_engine")


def node_facts() -> dict[str, Any]:
    """Return what must be equal on all nodes."""
    facts: dict[str, Any] = {name: version_of(name) for name in _COMPARED}
    facts["Python"] = sys.version.split()[0]
    if torch.cuda.is_available():
        facts["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
        facts["driver"] = (driver_versions() or ["unknown"])[0]
    return facts


def outliers(facts: dict[str, dict[str, Any]], clocks: dict[str, float]) -> dict[str, list[str]]:
    """Return the nodes that differ from most others, and their differences.

    Args:
        facts: versions on each node.
        clocks: seconds since the epoch on each node, taken at the same moment.
    """
    found = defaultdict(list)
    for name in next(iter(facts.values())):
        usual = Counter(node[name] for node in facts.values()).most_common(1)[0][0]
        for node, values in facts.items():
            if values[name] != usual:
                found[node].append(f"{name} is {values[name]}, {usual} on other nodes")
    middle = statistics.median_low(clocks.values())
    for node, seconds in clocks.items():
        if abs(seconds - middle) > MAX_CLOCK_SKEW_SECONDS:
            found[node].append(f"its clock is {seconds - middle:+.1f} s off")
    return dict(found)


def bus_bandwidth(size_bytes: int, seconds: float, ranks: int) -> float:
    """Return GB/s per rank in an all-reduce, as nccl-tests compute it."""
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
    seconds = torch.tensor((time.perf_counter() - start) / rounds, device=device)
    # The slowest rank decides, so that all ranks end with the same result.
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return bus_bandwidth(size, float(seconds), dist.get_world_size())


def _compare(verdicts: Path) -> None:
    """Gather the facts and clocks of all nodes; rank 0 writes the differences."""
    dist.barrier()
    ours = (node_name(), node_facts(), time.time())
    theirs: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(theirs, ours)
    if dist.get_rank() == 0:
        facts = {name: values for name, values, _ in theirs}
        clocks = {name: clock for name, _, clock in theirs}
        for node, problems in outliers(facts, clocks).items():
            write_verdict(verdicts, node, problems)
        print(f"preflight: {len(facts)} nodes, {len(theirs)} ranks compared")


def main(argv: list[str] | None = None) -> int:
    """Compare all nodes and time the network; return 0 unless it is too slow."""
    parser = argparse.ArgumentParser(prog="python -m megatron_let.doctor.nodes")
    parser.add_argument("--verdicts", type=Path, required=True, help="folder for one file per node")
    arguments = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    _compare(arguments.verdicts)
    bandwidth, wanted = _time_all_reduce(device), float(os.environ.get("LET_MIN_BUS_GBPS") or 0)
    if dist.get_rank() == 0:
        below = f", under LET_MIN_BUS_GBPS={wanted:g}" if bandwidth < wanted else ""
        print(f"preflight: all-reduce {bandwidth:.2f} GB/s{below}")
    dist.barrier()
    dist.destroy_process_group()
    return TOO_SLOW if bandwidth < wanted else 0


if __name__ == "__main__":
    sys.exit(main())
