"""Memory and speeds of the GPUs that the planner knows."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """A GPU and its interconnects.

    Attributes:
        memory: bytes that the driver offers.
        flops: dense bf16 FLOP/s, from the data sheet.
        link: bytes/s within a node, one way.
        network: bytes/s between nodes, per GPU.
        pcie: bytes/s to host memory, one way.
        host_memory: bytes/s that one rank's process reads and writes in host memory.
    """

    memory: int
    flops: float
    link: float
    network: float
    pcie: float = 25e9
    host_memory: float = 50e9


GPUS = {
    "a100-40g": Gpu(int(39.4 * 2**30), 312e12, 300e9, 25e9),
    "a100-80g": Gpu(int(79.1 * 2**30), 312e12, 300e9, 25e9),
    "h100-80g": Gpu(int(79.1 * 2**30), 989e12, 450e9, 50e9, pcie=50e9),
    "h200-141g": Gpu(int(139.8 * 2**30), 989e12, 450e9, 50e9, pcie=50e9),
}
