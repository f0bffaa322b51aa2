"""A rank of data-parallel training with LET outside Megatron: `-m tests.helpers.parallel_student`.

Each rank has its part of the batch. Writes the gradient of one step, and the mean of the ranks'
cosines, to `$OUTPUT`. `$WRAP` is one of `WRAPS`.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from megatron_let.late_to_early import LateToEarly
from tests.helpers.models import VOCAB_SIZE, random_model

# FSDP2 with a hook that is registered before or after the layer is sharded; DDP.
WRAPS = ("hook, shard", "shard, hook", "ddp")
BATCH, LENGTH, WIDTH = 4, 8, 20
LAYER = 2


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens `[b, s]` and the teacher's state `[b, s, d_T]`."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(VOCAB_SIZE, (BATCH, LENGTH), generator=generator)
    return ids, torch.randn(BATCH, LENGTH, WIDTH, generator=generator)


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    model = random_model("llama").train()
    wrap, layer, student = os.environ["WRAP"], model.model.layers[LAYER - 1], model
    let = None if wrap == "shard, hook" else LateToEarly(layer, 5.0)
    if wrap == "ddp":
        student = DistributedDataParallel(model)
    else:
        for module in (*model.model.layers, model):
            fully_shard(module)
    let = let or LateToEarly(layer, 5.0)
    ids, state = (x.chunk(ranks)[rank] for x in batch())
    with let.step(0, state):
        student(input_ids=ids, labels=ids).loss.backward()
    cosine = let.report["cosine"].clone()
    torch.distributed.all_reduce(cosine)
    gradients = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        assert isinstance(gradient, DTensor) == (wrap != "ddp")
        gradients[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    if rank == 0:
        found = {"gradients": gradients, "cosine": cosine / ranks}
        torch.save(found, Path(os.environ["OUTPUT"]) / "found.pt")
    torch.distributed.destroy_process_group()
