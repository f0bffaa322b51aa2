"""A rank of an FSDP2 training with LET: `-m tests.helpers.fully_sharded`.

Writes the whole gradient of one step, and the sum of the ranks' cosines over their number, to
`$OUTPUT`. Each rank has its part of the batch.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from megatron_let.late_to_early import LateToEarly
from tests.helpers.models import VOCAB_SIZE, random_model

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
    # A hook that is registered before the layer is sharded, or after.
    before = os.environ["HOOK"] == "before"
    layer = model.model.layers[LAYER - 1]
    let = LateToEarly(layer, 5.0) if before else None
    for module in (*model.model.layers, model):
        fully_shard(module)
    let = let or LateToEarly(layer, 5.0)
    ids, state = (x.chunk(ranks)[rank] for x in batch())
    with let.step(0, state):
        model(input_ids=ids, labels=ids).loss.backward()
    cosine = let.report["cosine"].clone()
    torch.distributed.all_reduce(cosine)
    gradients = {}
    for name, parameter in model.named_parameters():
        assert isinstance(parameter.grad, DTensor)
        gradients[name] = parameter.grad.full_tensor()
    if rank == 0:
        found = {"gradients": gradients, "cosine": cosine / ranks}
        torch.save(found, Path(os.environ["OUTPUT"]) / "found.pt")
    torch.distributed.destroy_process_group()
